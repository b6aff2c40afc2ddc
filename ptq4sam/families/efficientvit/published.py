"""What a published study of EfficientViT-SAM counts: Bengs and Ryhede Bengtsson (2024)."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ptq4sam.families.efficientvit.variants import SIZES, build_variant
from ptq4sam.quantization.levels import FLOAT
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.addresses import is_address, label, select
from ptq4sam.skeletons import shapes_alone

MEGABYTE = 2**20

FLOAT_MEAN_IOU = {"L0": 0.78509, "L1": 0.78835, "L2": 0.79130, "XL0": 0.79752, "XL1": 0.79930}
"""Of the float models, which the study compares with."""

_LAYERS = Path(__file__).with_name("published.csv")


@dataclass(frozen=True)
class LayerResult:
    """What the study measured of a model with one layer in INT8.

    Attributes:
        mean_iou: of masks of annotated boxes on COCO val2017, in 0-1.
        mean_iou_large: of objects of 96^2 pixels or more.
        mean_iou_medium: of those between.
        mean_iou_small: of objects of 32^2 pixels or less.
        megabytes_saved: by that layer, as `megabytes_saved` counts.
    """

    mean_iou: float
    mean_iou_large: float
    mean_iou_medium: float
    mean_iou_small: float
    megabytes_saved: float


def layer_results(name: str) -> dict[str, LayerResult]:
    """What the study measured layer by layer of a model, by address.

    Its tables have 8 addresses of XL1 that there are not, and miss some of L2 and XL1.

    Args:
        name: of the model; of one that the study has not measured there is nothing.
    """
    found = {}
    with _LAYERS.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(line for line in file if not line.startswith("#")):
            if row["layer"].startswith(f"{label(name)}:"):
                found[row["layer"]] = LayerResult(
                    mean_iou=float(row["all"]) / 100,
                    mean_iou_large=float(row["large"]) / 100,
                    mean_iou_medium=float(row["medium"]) / 100,
                    mean_iou_small=float(row["small"]) / 100,
                    megabytes_saved=int(row["parameters"]) / MEGABYTE,
                )
    return found


def megabytes_saved(name: str, scheme: Scheme) -> float:
    """Bytes that 8 bits save against float16, in 2^20, as the study counts them.

    One for each weight and bias of a convolution of the encoder whose weight is quantized: biases
    are those of networks whose batch normalisations are not folded, and the layer that sees pixels
    counts as quantized, which it is there.

    Args:
        name: of the model, a key of SIZES.
        scheme: its exceptions say what stays float.
    """
    with shapes_alone():
        sam = build_variant(name, SIZES[name], folded=False)
    found = ((path, sam.description.address_of(path)) for path, _ in sam.named_modules())
    known = {path: address for path, address in found if address is not None}
    left = dict.fromkeys(known, False)
    for unit, level in scheme.units.items():
        paths = select(unit, name, known) if is_address(unit) else []
        left |= dict.fromkeys(paths, level == FLOAT)
    layers = [sam.get_submodule(path) for path in known if not left[path]]
    weights = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    return sum(p.numel() for layer in weights for p in layer.parameters()) / MEGABYTE
