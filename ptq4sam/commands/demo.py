"""`ptq4sam demo`: the whole job on the embedded model and scenes."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ptq4sam demo`."""
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=Path("work_dirs/demo"),
        help="scenes, models, scores and pictures are written here (work_dirs/demo)",
    )


def run(parsed: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    from ptq4sam.runs.demo import run_demo

    return run_demo(parsed.work_dir)
