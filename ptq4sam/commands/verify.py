"""`ptq4sam verify`: compare a quantized model with its integer form, operator by operator."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ptq4sam.commands.flags import add_device, add_recursive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ptq4sam verify`."""
    parser.add_argument("model", type=Path, help="file written by ptq4sam quantize")
    parser.add_argument("--images", type=Path, help="folder of pictures; default: generated scenes")
    add_recursive(parser)
    parser.add_argument("--limit", type=int, default=4, metavar="N", help="pictures to use (4)")
    add_device(parser)


def run(parsed: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    from ptq4sam.columns import terminal_width
    from ptq4sam.data.images import check_limit
    from ptq4sam.deploy.storage import load
    from ptq4sam.progress import bars
    from ptq4sam.runs.settings import find_device
    from ptq4sam.runs.verifying import generated_subjects, pictured_subjects, verify_model

    check_limit(parsed.limit)
    model = load(parsed.model, find_device(parsed.device))
    subjects = (
        generated_subjects(parsed.limit)
        if parsed.images is None
        else pictured_subjects(parsed.images, parsed.limit, parsed.recursive)
    )
    verification = verify_model(model, subjects, bars)
    sys.stdout.write("\n".join(verification.lines(terminal_width())) + "\n")
    return 0 if verification.passed else 1
