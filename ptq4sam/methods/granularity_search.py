"""Search for the scale of an adaptive granularity: the least error of attention times values."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from ptq4sam.methods.granularity_points import point_parameters, to_points
from ptq4sam.quantization.mse import POWER, nearly_powered

_SHARE = 8
"""A search that is not exact compares granularities on one query of so many."""
_FEW_ROWS = 4096
"""Rows of attention (heads times queries) below which all are looked at."""
# Attention elements quantized at once in the search: one of ViT-B's global attentions at 1024 px
# has 201 million, of which no copy may be held.
_PIECE = {"cpu": 2**21, "cuda": 2**25}


def some_queries(attention: Tensor) -> Tensor:
    """One query in _SHARE of [..., n, m], the same ones each time; all where rows are few."""
    queries = attention.shape[-2]
    if attention[..., 0].numel() < _FEW_ROWS:
        return attention
    generator = torch.Generator("cpu").manual_seed(0)
    order = torch.randperm(queries, generator=generator, device="cpu")
    chosen = order[: -(-queries // _SHARE)].sort().values
    return attention.index_select(-2, chosen.to(attention.device))


class ScaleSearch:
    """Error of one batch's product with the values as a function of tau and scale.

    Args:
        attention: [..., n, m].
        value: [..., m, channels], the same leading axes.
        levels: number of points.
        tolerance: how near to the best scale the search stops.
        exact: powers of errors are torch's own, which take longer.
    """

    def __init__(
        self, attention: Tensor, value: Tensor, levels: int, tolerance: float, exact: bool = True
    ) -> None:
        self._tolerance, self._exact_powers = tolerance, exact
        self._attention = attention.detach().reshape(-1, *attention.shape[-2:])
        self._value = value.detach().reshape(-1, *value.shape[-2:])
        self._levels = levels
        heads, queries, keys = self._attention.shape
        elements = _PIECE.get(self._attention.device.type, 2**20)
        self._rows = min(queries, max(1, elements // keys))
        self._heads = max(1, elements // (queries * keys)) if self._rows == queries else 1
        self._exact = self._value.new_empty(heads, queries, value.shape[-1])
        for part, piece, values in self._pieces():
            self._exact[part] = piece @ values

    def best_scale(self, tau: int, largest: float) -> tuple[float, float]:
        """The scale of least error up to the largest attention, and that error."""
        found = minimize_scalar(
            lambda scale: self.error(tau, scale),
            bounds=(min(0.1, 0.01 * largest), largest),
            method="bounded",
            options={"xatol": self._tolerance},
        )
        return float(found.x), float(found.fun)

    def error(self, tau: int, scale: float) -> float:
        """Mean |Q(A) V - A V|^2.4."""
        scale_and_tau = self._attention.new_tensor([scale, tau])
        points = point_parameters(scale_and_tau[0], scale_and_tau[1], self._levels)
        total = torch.zeros((), dtype=torch.float64, device=self._attention.device)
        for part, piece, values in self._pieces():
            quantized = to_points(piece, *points)
            difference = (quantized @ values).sub_(self._exact[part])
            if self._exact_powers:
                powers = difference.abs_().pow_(POWER)
            else:
                powers = nearly_powered(difference)
            total += powers.sum(dtype=torch.float64)
        return float(total) / self._exact.numel()

    def _pieces(self) -> Iterator[tuple[tuple[slice, slice], Tensor, Tensor]]:
        """Where a piece of the attention is, the piece, and the values it is multiplied with."""
        heads, queries, _ = self._attention.shape
        for first in range(0, heads, self._heads):
            head = slice(first, first + self._heads)
            for start in range(0, queries, self._rows):
                row = slice(start, start + self._rows)
                yield (head, row), self._attention[head, row], self._value[head]
