"""vit_nano before its training, on inputs of any size; weights from one size to another."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from ptq4sam.families.sam_vit.sizes import SIZES
from ptq4sam.families.sam_vit.variants import build_variant
from ptq4sam.sam.model import Sam


def position_frequencies(count: int) -> Tensor:
    """Frequencies [2, count] of the position encoding, in cycles per half side of the input.

    SAM draws them at random. Here they are the harmonics of each axis, of which a step at a box's
    edge is a sum; their effect was not measured apart from other changes.
    """
    harmonics = torch.cat([torch.arange(1, 25) / 4, torch.logspace(0.83, 1.25, count // 2 - 24)])
    zeros = torch.zeros(count // 2)
    return torch.stack([torch.cat([harmonics, zeros]), torch.cat([zeros, harmonics])])


def build_model(window: int) -> Sam:
    """A vit_nano whose encoder takes windows; the prompt encoder keeps the whole input's frame.

    Args:
        window: side in pixels.
    """
    whole = build_variant("vit_nano", SIZES["vit_nano"])
    matrix = whole.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
    matrix.copy_(position_frequencies(matrix.shape[1]))
    if window != whole.image_size:
        small = dataclasses.replace(SIZES["vit_nano"], image_size=window)
        whole.image_encoder = build_variant("vit_nano", small).image_encoder
    return whole


def resize_encoder(state: dict[str, Tensor], target: dict[str, Tensor]) -> dict[str, Tensor]:
    """Carry the weights of an encoder over to another input size.

    Position embeddings are tiled or cut (they know the place in a window only), relative tables
    keep their offsets and repeat or lose their ends.
    """
    moved = {}
    for name, value in state.items():
        wanted = target[name].shape
        if name.endswith("pos_embed"):
            times = [-(-new // old) for new, old in zip(wanted, value.shape, strict=True)]
            value = value.repeat(*times)[:, : wanted[1], : wanted[2]]
        elif value.shape != wanted:
            side = (wanted[0] - value.shape[0]) // 2
            value = F.pad(value.t()[None], (side, side), mode="replicate")[0].t()
        moved[name] = value
    return moved
