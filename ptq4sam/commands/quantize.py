"""`ptq4sam quantize`: quantize a SAM and write it to a file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ptq4sam.commands.flags import add_run_arguments
from ptq4sam.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ptq4sam quantize`."""
    add_run_arguments(parser, images_required=False)
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="F",
        help="F.safetensors, or with --method nncf a folder",
    )
    parser.add_argument(
        "--method",
        choices=("ptq4sam", "nncf"),
        default="ptq4sam",
        help="nncf: export for OpenVINO with an image encoder that NNCF quantized to INT8, to "
        "compare with",
    )
    parser.add_argument(
        "--max-drop",
        type=float,
        metavar="POINTS",
        help="return units to 8 bits or float until the model is at most so many percentage points "
        "below the float one",
    )
    parser.add_argument("--drop-metric", choices=("mean_iou", "AP"), help="default: mean_iou")
    parser.add_argument(
        "--drop-pictures", type=int, metavar="N", help="pictures that single units are measured on"
    )
    parser.add_argument(
        "--validation-images",
        type=Path,
        metavar="D",
        help="pictures for --max-drop; default: --images",
    )
    parser.add_argument(
        "--validation-annotations", type=Path, metavar="C.json", help="their COCO instances file"
    )
    parser.add_argument(
        "--validation-limit", type=int, metavar="N", help="the first N of them only"
    )


def run(parsed: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    from ptq4sam.commands.requests import (
        accuracy_settings,
        execute,
        settings_from_arguments,
    )

    if parsed.method == "nncf":
        return _quantize_by_nncf(parsed)
    if parsed.scheme is None:
        raise ConfigError("ptq4sam quantize needs a scheme: give --scheme ptq4sam-l44")
    return execute(
        settings_from_arguments(
            parsed, save_model=parsed.output, accuracy=accuracy_settings(parsed)
        )
    )


def _quantize_by_nncf(parsed: argparse.Namespace) -> int:
    from ptq4sam.commands.requests import nncf_request
    from ptq4sam.runs.nncf import quantize_by_nncf

    quantize_by_nncf(nncf_request(parsed))
    sys.stdout.write(
        f"written to {parsed.output}; score it with ptq4sam evaluate --backend openvino "
        f"--checkpoint {parsed.output}\n"
    )
    return 0
