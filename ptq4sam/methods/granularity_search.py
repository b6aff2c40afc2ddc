"""Search for the scale of an adaptive granularity: the least error of attention times values.

The error is a jagged function of the scale, of which bounded minimisation, as published, finds one
of many minima. `least_error` looks everywhere first: on a geometric grid of scales, all of them in
one pass over the attention, then closer and closer around the best.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import scipy
import torch
from torch import Tensor

from ptq4sam.methods.granularity_points import (
    batched_points,
    point_parameters,
    to_points,
)
from ptq4sam.quantization.mse import POWER, nearly_powered

_SHARE = 8
"""A search that is not exact compares granularities on one query of so many."""
_FEW_ROWS = 4096
"""Rows of attention (heads times queries) below which all are looked at."""
# Attention elements quantized at once in the search: one of ViT-B's global attentions at 1024 px
# has 201 million, of which no copy may be held.
_PIECE = {"cpu": 2**21, "cuda": 2**25}


_GRID_SHARE, _GRID_ROWS = 64, 128
"""A search on a grid of scales looks at one query in so many, but at so many rows at least."""
_PUBLISHED_TOLERANCE = 1e-5
"""Where bounded minimisation stops: scipy's own."""
_FEW_ELEMENTS = 2**16
"""Elements of an attention up to which all of it is looked at, everywhere."""
_AT_ONCE = 2**19
"""Attention elements that several scales are looked at for together."""


@dataclass(frozen=True)
class _Effort:
    """Where a search looks.

    Attributes:
        per_octave: scales of the grid between one and twice that.
        around: how many of the best scales get neighbours, and how far away these are, in shares of
            an octave; one after the other.
    """

    per_octave: int
    around: tuple[tuple[int, int], ...] = ()


# Of few elements each scale is cheap.
_THOROUGH = _Effort(128, ((12, 256), (8, 512), (8, 1024), (6, 2048), (4, 4096), (2, 8192)))
_COARSE = _Effort(8, ((4, 16), (3, 32)))
_FINE = _Effort(16, ((6, 32), (4, 64), (3, 128)))
_SETTLING = _Effort(0, ((2, 128), (1, 256), (1, 512)))
_SURE = 6
"""Best scales on some queries that are looked at on all."""


def some_queries(attention: Tensor, share: int = _SHARE, few: int = _FEW_ROWS) -> Tensor:
    """One query in `share` of [..., n, m], the same ones each time; all where rows are few."""
    queries = attention.shape[-2]
    if attention[..., 0].numel() < few:
        return attention
    generator = torch.Generator("cpu").manual_seed(0)
    order = torch.randperm(queries, generator=generator, device="cpu")
    chosen = order[: -(-queries // share)].sort().values
    return attention.index_select(-2, chosen.to(attention.device))


def least_error(
    attention: Tensor, value: Tensor, levels: int, taus: Sequence[int]
) -> tuple[list[float], list[float]]:
    """Scales of least error for each granularity, and the errors.

    Of a small attention all of it is looked at, at the end point of bounded minimisation too, so
    that no error is above that one's. Of a larger one, granularities are compared on some queries;
    the best scales of the best one are then looked at on all. Errors are those that were compared.

    Args:
        attention: [..., n, m].
        value: [..., m, channels].
        levels: number of points.
        taus: granularities.
    """
    largest, rows = float(attention.max()), attention[..., 0].numel()
    ends = min(0.1, 0.01 * largest), largest
    thorough = attention.numel() <= _FEW_ELEMENTS
    share = 1 if thorough else max(1, min(_GRID_SHARE, rows // _GRID_ROWS))
    compared = some_queries(attention, share, few=0) if share > 1 else attention
    search = ScaleSearch(compared, value, levels, _PUBLISHED_TOLERANCE, exact=thorough)
    effort = _THOROUGH if thorough else _COARSE
    found = []
    for tau in taus:
        # One more scale, which no other can be worse than.
        bounded = [search.best_scale(tau, largest)[0]] if thorough else []
        found.append(_looked_at(search, tau, effort, ends, also=bounded))
    best = [_best(errors) for errors in found]
    least = [errors[scale] for errors, scale in zip(found, best, strict=True)]
    if not thorough:
        chosen = least.index(min(least))
        near = _looked_at(search, taus[chosen], _FINE, ends)
        sure = sorted(near, key=lambda scale: near[scale])[:_SURE]
        whole = ScaleSearch(attention, value, levels, 0.0, exact=False)
        best[chosen] = _best(_looked_at(whole, taus[chosen], _SETTLING, ends, sure))
    return best, least


def _best(errors: Mapping[float, float]) -> float:
    return min(errors, key=lambda scale: errors[scale])


def _looked_at(
    search: ScaleSearch,
    tau: int,
    effort: _Effort,
    ends: tuple[float, float],
    scales: Sequence[float] = (),
    also: Sequence[float] = (),
) -> dict[float, float]:
    """Errors of given scales or of a grid (and others), and closer and closer around the best."""
    lowest, largest = ends
    if not scales:
        octaves = math.log2(largest / lowest)
        last = max(1, round(octaves * effort.per_octave))
        scales = [largest * 2 ** (-octaves * place / last) for place in range(last + 1)]
    scales = [*scales, *also]
    errors = dict(zip(scales, search.errors(tau, scales), strict=True))
    for kept, share in effort.around:
        best = sorted(errors, key=lambda scale: errors[scale])[:kept]
        step = 2 ** (1 / share)
        beside = {min(largest, scale * step) for scale in best}
        beside |= {max(lowest, scale / step) for scale in best}
        new = sorted(beside - errors.keys())
        errors.update(zip(new, search.errors(tau, new), strict=True))
    return errors


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
        found = scipy.optimize.minimize_scalar(
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
            total += self._powered(difference).sum(dtype=torch.float64)
        return float(total) / self._exact.numel()

    def errors(self, tau: int, scales: Sequence[float]) -> list[float]:
        """`error` of several scales in one pass over the attention."""
        if not scales:
            return []
        numbers = self._attention.new_tensor([tau, *scales])
        totals = torch.zeros(len(scales), dtype=torch.float64, device=numbers.device)
        for part, piece, values in self._pieces():
            together = max(1, _AT_ONCE // piece.numel())
            for first in range(0, len(scales), together):
                some = numbers[1 + first : 1 + first + together]
                points = batched_points(piece, some, numbers[0], self._levels)
                difference = (points @ values).sub_(self._exact[part])
                powers = self._powered(difference)
                totals[first : first + together] += powers.sum((1, 2, 3), dtype=torch.float64)
        return (totals / self._exact.numel()).tolist()

    def _powered(self, difference: Tensor) -> Tensor:
        return difference.abs_().pow_(POWER) if self._exact_powers else nearly_powered(difference)

    def _pieces(self) -> Iterator[tuple[tuple[slice, slice], Tensor, Tensor]]:
        """Where a piece of the attention is, the piece, and the values it is multiplied with."""
        heads, queries, _ = self._attention.shape
        for first in range(0, heads, self._heads):
            head = slice(first, first + self._heads)
            for start in range(0, queries, self._rows):
                row = slice(start, start + self._rows)
                yield (head, row), self._attention[head, row], self._value[head]
