"""`ptq4sam cost`: what a SAM computes and holds, as a table or JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptq4sam.columns import aligned, terminal_width, wrapped
from ptq4sam.commands.flags import MODELS, add_decoder_only

if TYPE_CHECKING:
    from ptq4sam.deploy.cost import Cost, PartCost

_NOTE = (
    "one picture, {boxes} box{es}; multiply-accumulates, windows with their padding; not counted: "
    "norms, softmax, activation functions, sums. What is not quantized computes at 32 bits. float "
    "operations: each weighted by max(bits)/32; bit operations: by the product of both operands' "
    "bits. Activations: what the operations read."
)

_TITLES = (
    *("values\nM", "MB", "float\nMB", "GMAC", "float\nops G", "bit\nops T"),
    *("act.\nMB", "float\nMB"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ptq4sam cost`."""
    parser.add_argument(
        "--model",
        default="vit_nano",
        help=f"{', '.join(MODELS)}; default: vit_nano",
    )
    parser.add_argument("--scheme", type=Path, help="a name or a file; default: float")
    add_decoder_only(parser)
    parser.add_argument("--boxes", type=int, default=1, metavar="N", help="prompts on the picture")
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="of a SAM that was fine-tuned for another input than its own",
    )
    parser.add_argument("--file", type=Path, help="also show the sizes in this quantized file")
    parser.add_argument("--json", action="store_true", help="for programs")


def run(parsed: argparse.Namespace) -> int:
    """Count and print."""
    from ptq4sam.deploy.cost import count
    from ptq4sam.deploy.size_report import size_report
    from ptq4sam.errors import ConfigError
    from ptq4sam.quantization.scheme import Scheme

    if parsed.boxes < 1:
        raise ConfigError(f"asked for --boxes {parsed.boxes}: use 1 or more")
    scheme = None if parsed.scheme is None else Scheme.from_yaml(parsed.scheme)
    sizes = None if parsed.file is None else size_report(parsed.file)
    cost = count(
        parsed.model,
        scheme,
        quantize_encoder=not parsed.decoder_only,
        boxes=parsed.boxes,
        image_size=parsed.image_size,
    )
    if parsed.json:
        content = to_dict(cost)
        if sizes is not None:
            content["file"] = dataclasses.asdict(sizes)
        sys.stdout.write(json.dumps(content, indent=2) + "\n")
        return 0
    lines_of_file = [] if sizes is None else ["", f"{parsed.file}:", *sizes.lines(terminal_width())]
    sys.stdout.write("\n".join([*lines(cost), *lines_of_file]) + "\n")
    return 0


def to_dict(cost: Cost) -> dict[str, Any]:
    """Plain values, with the ratios to the float model."""
    return {
        "model": cost.model,
        "boxes": cost.boxes,
        "parts": [dataclasses.asdict(part) for part in cost.parts],
        "total": dataclasses.asdict(cost.total),
        "storage_ratio": cost.storage_ratio,
        "operations_ratio": cost.operations_ratio,
        "layers_ratio": cost.layers_ratio,
        "bit_operations_ratio": cost.bit_operations_ratio,
    }


def lines(cost: Cost) -> list[str]:
    """The table for people."""
    width = terminal_width()
    notes = (
        f"against float32: {cost.storage_ratio:.2f}x less storage, {cost.operations_ratio:.2f}x "
        f"fewer float operations ({cost.layers_ratio:.2f}x with attention products at 32 bits), "
        f"{cost.bit_operations_ratio:.2f}x fewer bit operations",
        _NOTE.format(boxes=cost.boxes, es="" if cost.boxes == 1 else "es"),
    )
    table = [[cost.model, *_TITLES], *map(_cells, (*cost.parts, cost.total))]
    return [*aligned(table, width=width), *(wrapped(note, width) for note in notes)]


def _cells(part: PartCost) -> list[str]:
    values = (
        part.parameters / 1e6,
        part.weight_bytes / 1e6,
        part.float_weight_bytes / 1e6,
        part.macs / 1e9,
        part.float_operations / 1e9,
        part.bit_operations / 1e12,
        part.activation_bytes / 1e6,
        part.float_activation_bytes / 1e6,
    )
    return [part.name, *map(_short, values)]


def _short(value: float) -> str:
    """At most five characters below 100,000, so that a line has room for all of them."""
    digits = 3 if value < 10 else 2 if value < 100 else 1 if value < 1000 else 0
    return f"{value:.{digits}f}"
