"""`ptq4sam report`: a run's or a sweep's work directory as one HTML file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ptq4sam report`."""
    parser.add_argument(
        "folder", type=Path, metavar="RUN", help="work directory of a run or a sweep"
    )
    parser.add_argument(
        "--output", type=Path, metavar="F.html", help="default: report.html in the work directory"
    )


def run(parsed: argparse.Namespace) -> int:
    """Write the page."""
    from ptq4sam.report.writing import write_report
    from ptq4sam.sizes import format_bytes

    path = write_report(parsed.folder, parsed.output)
    sys.stdout.write(f"written to {path}, {format_bytes(path.stat().st_size)}\n")
    return 0
