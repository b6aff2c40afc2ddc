"""`ptq4sam audit`: prove that a quantized model is one."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ptq4sam.commands.flags import add_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ptq4sam audit`."""
    parser.add_argument("model", type=Path, help="file written by ptq4sam quantize")
    add_device(parser)


def run(parsed: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    from ptq4sam.deploy.storage import load
    from ptq4sam.runs.auditing import audit_model
    from ptq4sam.runs.settings import find_device

    report = audit_model(load(parsed.model, find_device(parsed.device)))
    sys.stdout.write("\n".join(report.lines()) + "\n")
    return 0 if report.passed else 1
