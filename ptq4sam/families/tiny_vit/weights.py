"""From the published state dicts to those of inference: batch normalisations are folded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

NORM_EPS = 1e-5
"""Of the batch normalisations."""

_CONVOLUTION, _NORM = ".c.weight", ".bn."
_UNUSED = ("image_encoder.norm_head.", "image_encoder.head.")
"""The classifier of ImageNet, which a SAM never calls."""


def fold_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fold each batch normalisation into the convolution before it, and drop the classifier.

    Of `X.c.weight` and `X.bn.*` it makes `X.c.weight` and `X.c.bias`, in float64, rounded once. A
    state dict without batch normalisations is returned as it is, and so are tensors whose partners
    are missing, for whoever checks names to complain of.
    """
    kept = {name: value for name, value in state.items() if not name.startswith(_UNUSED)}
    folded: dict[str, Tensor] = {}
    for name, value in kept.items():
        unit = name.removesuffix(_CONVOLUTION)
        if name.endswith(_CONVOLUTION) and _is_normalised(kept, unit):
            folded |= _fold(kept, unit)
        elif not (_NORM in name and _is_normalised(kept, name.partition(_NORM)[0])):
            folded[name] = value
    return folded


def _is_normalised(state: Mapping[str, Tensor], unit: str) -> bool:
    """Whether a convolution and all of its normalisation are there, with shapes that fit."""
    names = ("weight", "bias", "running_mean", "running_var")
    parts = [state.get(f"{unit}{_NORM}{name}") for name in names]
    weight = state.get(unit + _CONVOLUTION)
    return weight is not None and all(p is not None and p.shape == weight.shape[:1] for p in parts)


def _fold(state: Mapping[str, Tensor], unit: str) -> dict[str, Tensor]:
    weight = state[unit + _CONVOLUTION]
    gain, bias, mean, variance = (
        state[f"{unit}{_NORM}{name}"].double()
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    factor = gain / torch.sqrt(variance + NORM_EPS)
    return {
        f"{unit}.c.weight": (weight.double() * factor[:, None, None, None]).float(),
        f"{unit}.c.bias": (bias - mean * factor).float(),
    }
