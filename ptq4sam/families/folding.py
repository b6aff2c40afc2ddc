"""Fold batch normalisations of a published state dict into the convolutions before them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_PARTS = ("weight", "bias", "running_mean", "running_var")
"""Of a normalisation."""


def fold_norms(
    state: Mapping[str, Tensor], convolution: str, norm: str, eps: float
) -> dict[str, Tensor]:
    """Fold each batch normalisation into the convolution beside it.

    Of `X.CONVOLUTION.weight` and `X.NORM.*` it makes `X.CONVOLUTION.weight` and
    `X.CONVOLUTION.bias`, in float64, rounded once. A state dict without batch normalisations is
    returned as it is, and so are tensors whose partners are missing, for whoever checks names to
    complain of.

    Args:
        state: tensors by name.
        convolution: last part of the path of each convolution: "c", "conv".
        norm: last part of the path of each normalisation: "bn", "norm".
        eps: of the normalisations.
    """
    weight_name, norm_name = f".{convolution}.weight", f".{norm}."
    folded: dict[str, Tensor] = {}
    for name, value in state.items():
        unit = name.removesuffix(weight_name)
        if name.endswith(weight_name) and _is_normalised(state, unit, weight_name, norm_name):
            parts = [state[f"{unit}{norm_name}{part}"].double() for part in _PARTS]
            weight, bias = _fold(value.double(), *parts, eps=eps)
            folded[name] = weight.float()
            folded[f"{name.removesuffix('weight')}bias"] = bias.float()
        elif norm_name not in name or not _is_normalised(
            state, name.rpartition(norm_name)[0], weight_name, norm_name
        ):
            folded[name] = value
    return folded


def _is_normalised(
    state: Mapping[str, Tensor], unit: str, weight_name: str, norm_name: str
) -> bool:
    """Whether a convolution and all of its normalisation are there, with shapes that fit."""
    weight = state.get(unit + weight_name)
    parts = [state.get(f"{unit}{norm_name}{name}") for name in _PARTS]
    return weight is not None and all(p is not None and p.shape == weight.shape[:1] for p in parts)


def _fold(
    weight: Tensor, gain: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, *, eps: float
) -> tuple[Tensor, Tensor]:
    factor = gain / torch.sqrt(variance + eps)
    return weight * factor[:, None, None, None], bias - mean * factor
