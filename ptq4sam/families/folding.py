"""Fold batch normalisations of a published state dict into the convolutions before them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


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
        if name.endswith(weight_name) and (parts := _norm_of(state, unit, weight_name, norm_name)):
            folded |= _fold(unit + weight_name.removesuffix(".weight"), value, *parts, eps)
        elif not (
            norm_name in name
            and _norm_of(state, name.rpartition(norm_name)[0], weight_name, norm_name)
        ):
            folded[name] = value
    return folded


def _norm_of(
    state: Mapping[str, Tensor], unit: str, weight_name: str, norm_name: str
) -> tuple[Tensor, ...] | None:
    """All tensors of a convolution's normalisation; None unless all are there, and fit it."""
    names = ("weight", "bias", "running_mean", "running_var")
    parts = [state.get(f"{unit}{norm_name}{name}") for name in names]
    weight = state.get(unit + weight_name)
    found = tuple(p for p in parts if weight is not None and p is not None)
    if weight is None or len(found) < len(names):
        return None
    return found if all(p.shape == weight.shape[:1] for p in found) else None


def _fold(
    path: str,
    weight: Tensor,
    gain: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    eps: float,
) -> dict[str, Tensor]:
    factor = gain.double() / torch.sqrt(variance.double() + eps)
    return {
        f"{path}.weight": (weight.double() * factor[:, None, None, None]).float(),
        f"{path}.bias": (bias.double() - mean.double() * factor).float(),
    }
