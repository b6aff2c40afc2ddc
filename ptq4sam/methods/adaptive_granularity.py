"""Adaptive granularity quantization of softmax outputs (PTQ4SAM, Lv et al. 2024, section 3.3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from ptq4sam.errors import CalibrationError
from ptq4sam.methods.granularity_table import (
    MOST_BITS,
    code_middles,
    fraction_bits,
    point_table,
    power_table,
)
from ptq4sam.quantization.base import Statistics
from ptq4sam.quantization.dropping import Choice, chosen, stays_float
from ptq4sam.quantization.fused import fused
from ptq4sam.quantization.grid import Grid, in_products, precise
from ptq4sam.quantization.mse import POWER
from ptq4sam.quantization.quantizers import EPS, Quantizer
from ptq4sam.quantization.scheme import TAUS

FLOOR = 1e-20
"""Smallest attention that a logarithm is taken of."""
_SHARE = 8
"""A search that is not exact compares granularities on one query of so many."""
_FEW_ROWS = 4096
"""Rows of attention (heads times queries) below which all are looked at."""
_TOLERANCE = 1e-3
"""Where a search that is not exact stops, as a share of the largest attention."""
_EXACT_TOLERANCE = 1e-5
"""Where an exact one stops: scipy's own."""
_MANTISSA_BITS = 23
_MANTISSA = (1 << _MANTISSA_BITS) - 1
_EXPONENT = 255 << _MANTISSA_BITS
# Attention elements quantized at once in the search: one of ViT-B's global attentions at 1024 px
# has 201 million, of which no copy may be held.
_PIECE = {"cpu": 2**21, "cuda": 2**25}


class AdaptiveGranularityQuantizer(Quantizer):
    """Points s * 2^(-code / tau) for code 0 .. 2^bits - 1, and zero.

    Calibration chooses tau and s so that the product with the values changes least. In integers
    2^(-code / tau) is a shift by code div tau of one of tau table entries, that of code mod tau.

    Args:
        grid: its bits give the number of points.
        exact: search as published, each granularity on all queries to scipy's own tolerance. Else
            granularities are compared on an eighth of the queries, and the scale of the chosen one
            is searched on all of them to a thousandth of the largest attention: a third of the
            work, for the same granularity and a scale within 2 %.
        taus: granularities to choose from.

    Attributes:
        tau: [] one of TAUS.
        scale: [] largest point, learned.
    """

    tau: Tensor

    def __init__(self, grid: Grid, exact: bool = True, taus: Sequence[int] = TAUS) -> None:
        super().__init__(grid)
        self._exact = exact
        self._taus = tuple(taus)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("tau", torch.ones(()))
        self._batches = 0
        self._scale_sums = [0.0] * len(self._taus)
        self._error_sums = [0.0] * len(self._taus)

    @property
    def tau_scales(self) -> list[float]:
        """Mean best scale of each tau over the batches observed."""
        return [total / max(1, self._batches) for total in self._scale_sums]

    @property
    def tau_errors(self) -> list[float]:
        """Sum of the least errors of each tau over the batches observed."""
        return list(self._error_sums)

    def batch_statistics(self, x: Tensor, value: Tensor | None) -> Statistics:
        """Search a scale for each tau.

        Args:
            x: [..., n, m] softmax output.
            value: [..., m, channels] what it is multiplied with.

        Returns:
            Best scales and their errors, one for each tau, float64.

        Raises:
            CalibrationError: no value was given, or an attention that is negative or all zero.
        """
        if value is None:
            raise CalibrationError(
                "its search weighs errors by the values, none were given: call it with "
                "(attention, value)"
            )
        low, high = torch.aminmax(x)
        if float(low) < 0 or float(high) == 0:
            raise CalibrationError(
                f"softmax outputs were expected, found values from {float(low):.3g} to "
                f"{float(high):.3g}: use another quantizer here"
            )
        levels, largest = self.grid.levels, float(high)
        tolerance = _EXACT_TOLERANCE if self._exact else _TOLERANCE * largest
        # Where there is nothing to choose there is nothing to compare either.
        compared = x if self._exact or len(self._taus) == 1 else _some_queries(x)
        search = _ScaleSearch(compared, value, levels, tolerance)
        scales, errors = zip(*(search.best_scale(tau, largest) for tau in self._taus), strict=True)
        if compared is x:
            return _doubles(scales), _doubles(errors)
        best = errors.index(min(errors))
        whole = _ScaleSearch(x, value, levels, tolerance)
        scale, _ = whole.best_scale(self._taus[best], largest)
        return _doubles((*scales[:best], scale, *scales[best + 1 :])), _doubles(errors)

    def merge(self, statistics: Statistics) -> None:
        """Set the tau of the least error over all batches, and its mean scale."""
        scales, errors = (found.tolist() for found in statistics)
        self._scale_sums = [a + b for a, b in zip(self._scale_sums, scales, strict=True)]
        self._error_sums = [a + b for a, b in zip(self._error_sums, errors, strict=True)]
        self._batches += 1
        best = self._error_sums.index(min(self._error_sums))
        self.tau.fill_(self._taus[best])
        self._set_parameters(self.scale.new_tensor(self.tau_scales[best]), self.zero_point)
        self.clamp_scale_()

    def quantize(self, x: Tensor) -> Tensor:
        """Move `x` to the nearest point in the logarithm; points below the last give zero."""
        return self._quantize(x, None)

    def quantize_some(self, x: Tensor, choice: Choice) -> Tensor:
        """Move `x` to its points, but for the elements that stay float (QDrop)."""
        return self._quantize(x, choice)

    def _quantize(self, x: Tensor, choice: Choice | None) -> Tensor:
        scale = self._positive_scale()
        points = _point_parameters(scale, self.tau, self.grid.levels)
        if choice is None and not torch.is_grad_enabled():
            return _quantize(x, *points)
        result: Tensor = _AdaptiveGranularity.apply(  # type: ignore[no-untyped-call]
            x, *points, choice
        )
        return result

    @torch.no_grad()
    def scale_in_use(self) -> Tensor:
        """The scale that it quantizes with, [], positive.

        Raises:
            CalibrationError: the quantizer was not calibrated.
        """
        self._require_calibration()
        return self._positive_scale()

    def _positive_scale(self) -> Tensor:
        # Whoever optimises calls clamp_scale_(); this keeps a step in between from harm.
        return self.scale.abs().clamp(min=EPS)

    @torch.no_grad()
    def steps(self, x: Tensor) -> Tensor:
        """Points as whole numbers of `fraction_bits` after the point, in units of the scale.

        In float64 where their sums need it.
        """
        tau, levels, bits = int(self.tau), self.grid.levels, self.fraction_bits()
        dtype = torch.float64 if bits == MOST_BITS else torch.float32
        table = point_table(levels, tau, bits).to(x.device, dtype)
        parameters = (*self._code_parameters(), table, levels)
        return _table_steps(x.reshape(-1), *parameters).reshape(x.shape)

    def _code_parameters(self) -> tuple[Tensor, Tensor, Tensor]:
        tau = self.tau.to(torch.int32)
        return self.scale_in_use(), code_middles(int(tau)).to(tau.device), tau

    @property
    def step(self) -> Tensor:
        """What the last fraction bit is worth."""
        return self.scale_in_use() * 2.0 ** -self.fraction_bits()

    def fraction_bits(self) -> int:
        """Fraction bits of `steps`, in units of the scale."""
        return fraction_bits(self.grid.levels, int(self.tau), float(self.scale_in_use()))

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Integer codes of `x`, int32; code 2^bits, one beyond the grid, stands for zero."""
        flat, levels = x.reshape(-1), self.grid.levels
        codes = _clamped_codes_at_once(flat, *self._code_parameters(), levels)
        return codes.reshape(x.shape)


def _doubles(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _clamped_codes(x: Tensor, scale: Tensor, middles: Tensor, tau: Tensor, levels: int) -> Tensor:
    """round(-tau * log2(x / scale)) of `x` rounded to float32, exactly: 0 .. levels, int32.

    The logarithm of 2^e m, m from 1 to 2, is e and that of m, which `middles` rounds. What is not a
    number has code 0.
    """
    bits = (x.to(torch.float32).clamp(min=FLOOR) / scale).view(torch.int32)
    exponent, mantissa = (bits >> _MANTISSA_BITS) - 127, bits & _MANTISSA
    above = (mantissa >= middles[0]).to(torch.int32)
    for index in range(1, max(TAUS)):
        above = above + (mantissa >= middles[index]).to(torch.int32)
    return (-exponent * tau - above).clamp(0, levels)


_clamped_codes_at_once = fused(_clamped_codes)


@fused
def _table_steps(
    x: Tensor, scale: Tensor, middles: Tensor, tau: Tensor, table: Tensor, levels: int
) -> Tensor:
    points = table[_clamped_codes(x, scale, middles, tau, levels).to(torch.int64)]
    # What is not a number stays so, to be found.
    return points + (x - x).to(table.dtype)


def _point_parameters(
    scale: Tensor, tau: Tensor, levels: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What kernels need of the points: scale, rows of `power_table`, half a step below the last.

    The end is not computed within a kernel, which would do so anew for every few elements.
    """
    # Without asking the device for tau.
    row = tau.to(torch.int64).reshape(1)
    middles, powers = (table.index_select(0, row)[0] for table in power_table(scale.device))
    end = scale.detach() * torch.exp2((0.5 - levels) / tau)
    return scale, middles, powers, end


def _nearest_power(x: Tensor, scale: Tensor, middles: Tensor, powers: Tensor) -> Tensor:
    """The power of 2^(1 / tau) that is nearest to x / scale in the logarithm, float32.

    From the bits of float32 numbers, as in `_clamped_codes`: logarithm and power take twice as
    long.
    """
    bits = (x.to(torch.float32).clamp(min=FLOOR) / scale).view(torch.int32)
    mantissa = bits & _MANTISSA
    factor = (mantissa >= middles[0]).to(torch.float32) * powers[0]
    for index in range(1, max(TAUS)):
        factor = factor.maximum((mantissa >= middles[index]).to(torch.float32) * powers[index])
    return (bits & _EXPONENT).view(torch.float32) * factor.clamp(min=1)


def _on_points(
    x: Tensor, scale: Tensor, middles: Tensor, powers: Tensor, end: Tensor
) -> tuple[Tensor, Tensor]:
    """The points of `x`, and 1 where it is above the largest one, else 0; both float32."""
    power = _nearest_power(x, scale, middles, powers)
    points = power.clamp(max=1) * scale
    # Numbers, not booleans: on a CPU a choice by booleans takes ten times as long. What is not a
    # number stays so, to be found.
    points = points * (points > end).to(points.dtype) + (x - x)
    return points, (power > 1).to(points.dtype)


@fused
def _quantize(x: Tensor, scale: Tensor, middles: Tensor, powers: Tensor, end: Tensor) -> Tensor:
    points, _ = _on_points(precise(x), scale, middles, powers, end)
    return points.to(x.dtype)


@fused
def _quantize_some(
    x: Tensor,
    drawn: Tensor,
    shift: Tensor,
    mask: int,
    limit: int,
    scale: Tensor,
    middles: Tensor,
    powers: Tensor,
    end: Tensor,
    like: Tensor,
) -> Tensor:
    points, _ = _on_points(precise(x), scale, middles, powers, end)
    kept = stays_float(drawn, shift, mask, limit)
    return chosen(points, precise(x), kept).to(like.dtype)


def _slopes(
    x: Tensor, scale: Tensor, middles: Tensor, powers: Tensor, end: Tensor
) -> tuple[Tensor, Tensor]:
    """Derivatives of the points by attention and scale.

    Straight through the rounding of the code, cut where the code is clamped or vanishes. Within the
    grid s * 2^(log2(a / s)) does not depend on s, so that only attentions above the largest point
    move the scale.
    """
    points, above = _on_points(x, scale, middles, powers, end)
    slope = points / x.clamp(min=FLOOR)
    return slope * ((x > FLOOR).to(x.dtype) - above).clamp(min=0), above


@fused
def _gradients(
    x: Tensor, gradient: Tensor, scale: Tensor, middles: Tensor, powers: Tensor, end: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of attention and scale."""
    slope, above = _slopes(precise(x), scale, middles, powers, end)
    return (slope * gradient).to(x.dtype), (above * gradient).sum()


@fused
def _gradients_of_some(
    x: Tensor,
    gradient: Tensor,
    drawn: Tensor,
    shift: Tensor,
    mask: int,
    limit: int,
    scale: Tensor,
    middles: Tensor,
    powers: Tensor,
    end: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of attention and scale where some elements stay float."""
    kept = stays_float(drawn, shift, mask, limit)
    slope, above = _slopes(precise(x), scale, middles, powers, end)
    for_x = (slope * (1 - kept) + kept) * gradient
    return for_x.to(x.dtype), (above * (1 - kept) * gradient).sum()


class _AdaptiveGranularity(torch.autograd.Function):
    """Quantization of all or some elements; points are computed again for the gradients.

    Keeping those of a decoder's attention under 100 boxes would take as much memory as the
    attention itself.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        middles: Tensor,
        powers: Tensor,
        end: Tensor,
        choice: Choice | None,
    ) -> Tensor:
        points = scale, middles, powers, end
        ctx.save_for_backward(x, *points)
        ctx.choice = choice
        if choice is None:
            return _quantize(x, *points)
        some = _quantize_some(choice.rows(x), *choice.parts(), *points, in_products(x))
        return some.reshape(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, *points = ctx.saved_tensors
        choice: Choice | None = ctx.choice
        if choice is None:
            for_x, for_scale = _gradients(x, gradient, *points)
        else:
            rows, gradient = choice.rows(x), choice.rows(gradient)
            for_x, for_scale = _gradients_of_some(rows, gradient, *choice.parts(), *points)
        return for_x.reshape(x.shape), for_scale, None, None, None, None


def _some_queries(attention: Tensor) -> Tensor:
    """One query in _SHARE of [..., n, m], the same ones each time; all where rows are few."""
    queries = attention.shape[-2]
    if attention[..., 0].numel() < _FEW_ROWS:
        return attention
    order = torch.randperm(queries, generator=torch.Generator().manual_seed(0))
    chosen = order[: -(-queries // _SHARE)].sort().values
    return attention.index_select(-2, chosen.to(attention.device))


class _ScaleSearch:
    """Error of one batch's product with the values as a function of tau and scale.

    Args:
        attention: [..., n, m].
        value: [..., m, channels], the same leading axes.
        levels: number of points.
        tolerance: how near to the best scale the search stops.
    """

    def __init__(self, attention: Tensor, value: Tensor, levels: int, tolerance: float) -> None:
        self._tolerance = tolerance
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
        numbers = self._attention.new_tensor([scale, tau])
        points = _point_parameters(*numbers.unbind(), self._levels)
        total = torch.zeros((), dtype=torch.float64, device=self._attention.device)
        for part, piece, values in self._pieces():
            quantized = _quantize(piece, *points)
            difference = (quantized @ values).sub_(self._exact[part])
            total += difference.abs_().pow_(POWER).sum(dtype=torch.float64)
        return float(total) / self._exact.numel()

    def _pieces(self) -> Iterator[tuple[tuple[slice, slice], Tensor, Tensor]]:
        """Where a piece of the attention is, the piece, and the values it is multiplied with."""
        heads, queries, _ = self._attention.shape
        for first in range(0, heads, self._heads):
            head = slice(first, first + self._heads)
            for start in range(0, queries, self._rows):
                row = slice(start, start + self._rows)
                yield (head, row), self._attention[head, row], self._value[head]
