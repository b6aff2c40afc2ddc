"""`ptq4sam evaluate`: score a SAM, float or quantized, on a data set."""

from __future__ import annotations

import argparse
from pathlib import Path

from ptq4sam.commands.flags import add_backend_arguments, add_run_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ptq4sam evaluate`."""
    add_run_arguments(parser, images_required=True)
    parser.add_argument("--show-dir", type=Path, help="write pictures with masks here")
    parser.add_argument(
        "--show-score-thr",
        type=float,
        default=0.3,
        metavar="T",
        help="draw masks of this score and more (0.3)",
    )
    parser.add_argument("--output", type=Path, help="write the masks as COCO results JSON")
    add_backend_arguments(parser)


def run(parsed: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    from ptq4sam.commands.requests import execute, settings_from_arguments

    settings = settings_from_arguments(
        parsed,
        show_dir=parsed.show_dir,
        show_threshold=parsed.show_score_thr,
        results=parsed.output,
        backend=parsed.backend,
        precision=parsed.precision,
    )
    return execute(settings)
