"""What a published study of EfficientViT-SAM counts: Bengs and Ryhede Bengtsson (2024)."""

from __future__ import annotations

import torch

from ptq4sam.families.efficientvit.variants import SIZES, build_variant
from ptq4sam.quantization.scheme import FLOAT, Scheme
from ptq4sam.sam.addresses import is_address, select

_MEGABYTE = 2**20


def megabytes_saved(name: str, scheme: Scheme) -> float:
    """Bytes that 8 bits save against float16, in 2^20, as the study counts them.

    One for each weight and bias of a convolution of the encoder whose weight is quantized: biases
    are those of networks whose batch normalisations are not folded, and the layer that sees pixels
    counts as quantized, which it is there.

    Args:
        name: of the model, a key of SIZES.
        scheme: its exceptions say what stays float.
    """
    with torch.device("meta"):
        sam = build_variant(name, SIZES[name], folded=False)
    found = ((path, sam.description.address_of(path)) for path, _ in sam.named_modules())
    known = {path: address for path, address in found if address is not None}
    left = dict.fromkeys(known, False)
    for unit, level in scheme.units.items():
        paths = select(unit, name, known) if is_address(unit) else []
        left |= dict.fromkeys(paths, level == FLOAT)
    layers = [sam.get_submodule(path) for path in known if not left[path]]
    return sum(p.numel() for layer in layers for p in layer.parameters()) / _MEGABYTE
