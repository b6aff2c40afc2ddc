"""`ptq4sam prompts`: write a detector's boxes as COCO results."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ptq4sam.commands.flags import SOURCES, add_limit, add_recursive, add_skip_bad
from ptq4sam.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ptq4sam prompts`."""
    parser.add_argument(
        "--detector", required=True, metavar="SOURCE", help=f"where boxes come from: {SOURCES}"
    )
    parser.add_argument(
        "--dataset",
        metavar="D",
        help="coco or another name in projects/configs/_base_, a configuration .py, a COCO "
        "instances .json with its pictures beside it, or a folder of pictures",
    )
    parser.add_argument("--images", type=Path, help="instead of --dataset: folder of pictures")
    parser.add_argument("--annotations", type=Path, metavar="A.json", help="COCO instances file")
    parser.add_argument("--out", type=Path, required=True, metavar="BOXES.json")
    add_limit(parser, "the first N pictures only")
    add_skip_bad(parser)
    add_recursive(parser)
    parser.add_argument("--device", help="cpu or cuda:0; default: cpu")


def run(parsed: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    from ptq4sam import parallel
    from ptq4sam.progress import bars
    from ptq4sam.runs.configs.datasets import find_dataset
    from ptq4sam.runs.detecting import detect
    from ptq4sam.runs.settings import DataSettings

    limit = parsed.limit
    if parsed.dataset is not None:
        if parsed.images is not None or parsed.annotations is not None:
            raise ConfigError(
                "--dataset names pictures and annotations: leave --images and --annotations away"
            )
        named = find_dataset(parsed.dataset)
        recursive = parsed.recursive or named.recursive
        data = DataSettings(named.images, named.annotations, recursive)
        limit = limit or named.limit
    elif parsed.images is not None:
        data = DataSettings(parsed.images, parsed.annotations, parsed.recursive)
    else:
        raise ConfigError("ptq4sam prompts needs pictures: give --dataset or --images")
    with parallel.joined():
        found = detect(
            parsed.detector,
            data,
            parsed.out,
            device=parsed.device,
            limit=limit,
            skip_bad=parsed.skip_bad,
            progress=bars,
        )
        if parallel.is_first():
            sys.stdout.write(f"{found} boxes written to {parsed.out}\n")
    return 0
