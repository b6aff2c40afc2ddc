"""The `ptq4sam` command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module

from ptq4sam.commands.overwriting import refuse_overwriting
from ptq4sam.commands.parsing import OneLineParser
from ptq4sam.terminal import guarded
from ptq4sam.version import __version__

_VERBS = {
    "evaluate": ("score a SAM, float or quantized, on a data set", "ptq4sam.commands.evaluate"),
    "quantize": ("quantize a SAM and write it to a file", "ptq4sam.commands.quantize"),
    "distil": (
        "train a SAM by another one, float or with quantizers",
        "ptq4sam.commands.distil",
    ),
    "export": ("write a SAM for ONNX Runtime or OpenVINO", "ptq4sam.commands.export"),
    "prompts": ("write a detector's boxes as COCO results", "ptq4sam.commands.prompts"),
    "everything": ("find masks without prompts", "ptq4sam.commands.everything"),
    "audit": ("prove that a quantized model is one", "ptq4sam.commands.audit"),
    "verify": (
        "compare a quantized model with its integer form, operator by operator",
        "ptq4sam.commands.verify",
    ),
    "size": ("what takes the bytes of a quantized model, by part", "ptq4sam.commands.size"),
    "cost": ("operations and bytes of a SAM, by part", "ptq4sam.commands.cost"),
    "sensitivity": (
        "which quantizers harm the masks most, unit by unit",
        "ptq4sam.commands.sensitivity",
    ),
    "mixed": ("bits for each unit under a budget, as a scheme", "ptq4sam.commands.mixed"),
    "sweep": ("a grid of trials from a file, resumable", "ptq4sam.commands.sweep"),
    "table": ("the published table beside your figures", "ptq4sam.commands.table"),
    "report": ("a run or a sweep as one HTML file", "ptq4sam.commands.report"),
    "scenes": ("write generated scenes as a COCO-format data set", "ptq4sam.commands.scenes"),
    "demo": ("the whole job on the embedded model and scenes", "ptq4sam.commands.demo"),
    "download": ("get published weights and data by name", "ptq4sam.commands.download"),
}
"""Verbs with their help and their module, which has `add_arguments` and `run`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status (2 for an error the user can fix)."""
    parsed = build_parser().parse_args(arguments)
    return guarded(lambda: _run(parsed), parsed.verbose, _goes_on(parsed))


def _goes_on(parsed: argparse.Namespace) -> str:
    """How a command goes on when it was interrupted; empty where it starts anew."""
    # A run that quantizes nothing has nothing to go on with; a training has, without a scheme.
    kept = parsed.verb == "distil" or getattr(parsed, "scheme", None) is not None
    if parsed.verb in ("sweep", "table") or (kept and getattr(parsed, "resume", False)):
        return "the same command goes on with it"
    if kept and hasattr(parsed, "resume"):
        return "the same command with --resume goes on with it"
    return ""


def _run(parsed: argparse.Namespace) -> int:
    refuse_overwriting(parsed)
    status: int = parsed.run(parsed)
    return status


def build_parser() -> argparse.ArgumentParser:
    """The command line with all its verbs."""
    parser = OneLineParser(
        prog="ptq4sam",
        description="Quantize Segment Anything models after training, score, export and compare "
        "them. `ptq4sam VERB --help` has the flags of a verb, docs/commands.md what to use for "
        "what, and `ptq4sam demo` needs nothing.",
    )
    parser.add_argument("--version", action="version", version=f"ptq4sam {__version__}")
    parser.add_argument("--verbose", action="store_true", help="log details")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    for verb, (purpose, path) in _VERBS.items():
        module = import_module(path)
        own = verbs.add_parser(
            verb, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}."
        )
        module.add_arguments(own)
        own.set_defaults(run=module.run, verb=verb)
    return parser
