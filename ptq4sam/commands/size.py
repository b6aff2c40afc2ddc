"""`ptq4sam size`: what takes the bytes of a quantized model, by part."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ptq4sam size`."""
    parser.add_argument("model", type=Path, help="file written by ptq4sam quantize")


def run(parsed: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    from ptq4sam.columns import terminal_width
    from ptq4sam.deploy.size_report import size_report

    sys.stdout.write("\n".join(size_report(parsed.model).lines(terminal_width())) + "\n")
    return 0
