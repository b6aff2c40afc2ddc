"""`ptq4sam scenes`: write generated scenes as a COCO-format data set."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ptq4sam.commands.flags import add_seed
from ptq4sam.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ptq4sam scenes`."""
    parser.add_argument("folder", type=Path, help="receives images/ and annotations/")
    parser.add_argument(
        "--train", type=int, default=32, metavar="N", help="scenes to calibrate on (32)"
    )
    parser.add_argument("--val", type=int, default=100, metavar="N", help="scenes to score (100)")
    add_seed(parser)


def run(parsed: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    from ptq4sam.data.scenes import write_scenes
    from ptq4sam.locks import alone_in

    for count in (parsed.train, parsed.val):
        if count < 1:
            raise ConfigError(f"a data set needs at least one scene, {count} were asked for")
    with alone_in(parsed.folder):
        for offset, (name, count) in enumerate((("train", parsed.train), ("val", parsed.val))):
            images, annotations = write_scenes(parsed.folder, count, 2 * parsed.seed + offset, name)
            sys.stdout.write(f"{count} scenes in {images}, annotations {annotations}\n")
    return 0
