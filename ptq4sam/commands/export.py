"""`ptq4sam export`: write a SAM for ONNX Runtime or OpenVINO."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ptq4sam.commands.flags import MODELS
from ptq4sam.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ptq4sam export`."""
    parser.add_argument(
        "model",
        help=f"file written by ptq4sam quantize, or for a float SAM its name: {', '.join(MODELS)}",
    )
    parser.add_argument("--checkpoint", type=Path, help="float weights of a model given by name")
    parser.add_argument("--format", required=True, metavar="F", help="onnx or openvino")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder for encoder, decoder and a JSON file about them",
    )
    parser.add_argument(
        "--fast",
        action="store_true",
        help="openvino: its own softmax, norms and roundings, in 0.6 of the time; masks are "
        "near the simulation's, not equal",
    )
    parser.add_argument(
        "--products",
        metavar="P",
        help="openvino: how codes are multiplied, int8 or float32, whose files are exact on every "
        "processor even without ptq4sam; default: int8 where that is exact here",
    )


def run(parsed: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    from ptq4sam.deploy.container import is_quantized_file
    from ptq4sam.deploy.export import export
    from ptq4sam.deploy.storage import load
    from ptq4sam.downloads import Missing
    from ptq4sam.families.checkpoint import load_sam
    from ptq4sam.runs.needed import look_for_sam
    from ptq4sam.sam.model import Sam
    from ptq4sam.sizes import format_bytes

    missing = Missing()
    if is_quantized_file(parsed.model):
        if parsed.checkpoint is not None:
            raise ConfigError(f"{parsed.model} has its weights: omit --checkpoint")
        sam: Sam = load(parsed.model)
    elif parsed.model.endswith(".safetensors"):
        missing.look_for("quantized model", Path(parsed.model))
        missing.report()
        raise ConfigError(
            f"{parsed.model} is no quantized model: name a float one (vit_b) and give its weights "
            "by --checkpoint"
        )
    else:
        look_for_sam(missing, parsed.model, parsed.checkpoint)
        missing.report()
        sam = load_sam(parsed.model, parsed.checkpoint)
    manifest = export(sam, parsed.output, parsed.format, fast=parsed.fast, products=parsed.products)
    for name in manifest.files:
        path = parsed.output / name
        sys.stdout.write(f"{path} {format_bytes(path.stat().st_size)}\n")
    return 0
