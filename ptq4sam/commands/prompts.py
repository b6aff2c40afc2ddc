"""`ptq4sam prompts`: write a detector's boxes as COCO results."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ptq4sam.commands.flags import (
    SOURCES,
    add_device,
    add_images,
    add_limit,
    add_recursive,
    add_skip_bad,
)
from ptq4sam.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ptq4sam prompts`."""
    parser.add_argument(
        "--detector", required=True, metavar="SOURCE", help=f"where boxes come from: {SOURCES}"
    )
    add_images(parser, required=False)
    parser.add_argument(
        "--dataset", dest="images", type=Path, help=argparse.SUPPRESS
    )  # its old name
    parser.add_argument("--annotations", type=Path, metavar="A.json", help="COCO instances file")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="BOXES.json",
        help="the boxes, as --prompts takes them",
    )
    add_limit(parser, "the first N pictures only")
    add_skip_bad(parser)
    add_recursive(parser)
    add_device(parser)


def run(parsed: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    from ptq4sam import parallel
    from ptq4sam.commands.requests import data_pair
    from ptq4sam.progress import bars
    from ptq4sam.runs.detecting import detect
    from ptq4sam.runs.settings import find_device

    data = data_pair("", parsed.images, parsed.annotations, parsed.recursive)
    if data is None:
        raise ConfigError("ptq4sam prompts needs pictures: give --images")
    with parallel.joined():
        found = detect(
            parsed.detector,
            data,
            parsed.output,
            device=find_device(parsed.device),
            limit=parsed.limit,
            skip_bad=parsed.skip_bad,
            progress=bars,
        )
        if parallel.is_first():
            sys.stdout.write(f"{found} boxes written to {parsed.output}\n")
    return 0
