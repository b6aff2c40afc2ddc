"""`ptq4sam mixed`: bits for each unit under a budget, written as a scheme."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ptq4sam.commands.flags import add_run_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ptq4sam mixed`."""
    add_run_arguments(parser, images_required=True)
    parser.add_argument(
        "--budget",
        nargs="+",
        required=True,
        metavar="LIMIT",
        help="w4a4: bytes and bit operations of the uniform scheme; 15%%: of the float weights; "
        "2MiB; 60GBOP: bit operations of a picture; several hold together",
    )
    parser.add_argument(
        "--bits",
        nargs="+",
        type=int,
        default=[3, 4, 5, 6, 8],
        metavar="B",
        help="choices for weights and for activations (3 4 5 6 8)",
    )
    parser.add_argument(
        "--pictures", type=int, default=8, metavar="N", help="errors are measured on so many (8)"
    )
    parser.add_argument(
        "--metric",
        default="logits",
        help="errors are of the mask logits (logits, the default) or of masks (agreement)",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="S.yaml", help="the scheme to write"
    )


def run(parsed: argparse.Namespace) -> int:
    """Measure, choose, write, and show what was chosen."""
    from ptq4sam import parallel
    from ptq4sam.commands.requests import settings_from_arguments
    from ptq4sam.progress import bars
    from ptq4sam.studies.mixed.run import MixedSettings, mix, plan_lines

    asked = MixedSettings(
        budget=tuple(parsed.budget),
        output=parsed.output,
        bits=tuple(parsed.bits),
        pictures=parsed.pictures,
        metric=parsed.metric,
        resume=parsed.resume,
    )
    settings = settings_from_arguments(parsed)
    if settings.dry_run:
        sys.stdout.write("\n".join(plan_lines(settings, asked)) + "\n")
        return 0
    with parallel.joined():
        found = mix(settings, asked, bars)
        if parallel.is_first():
            sys.stdout.write("\n".join(found.lines()) + "\n")
            sys.stdout.write(f"written to {parsed.output}; run it with --scheme {parsed.output}\n")
    return 0
