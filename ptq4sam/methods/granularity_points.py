"""Moving softmax outputs to the points of an adaptive granularity, and gradients through it.

Kernels work on the bits of float32 numbers. Of the points s 2^(-c / tau) the one nearest to a share
2^e m of the scale s, m from 1 to 2, is 2^e times one of tau + 1 numbers, which m tells by tau
comparisons. Logarithm and power would take twice as long. Kernels see tensors flat, or as `Choice`
gives them, so that one serves all shapes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ptq4sam.methods.granularity_table import power_table
from ptq4sam.quantization.division import divided
from ptq4sam.quantization.dropping import Choice, chosen, stays_float
from ptq4sam.quantization.fused import fused, fused_exactly
from ptq4sam.quantization.grid import in_products, precise, summed
from ptq4sam.quantization.hard_numbers import near_points
from ptq4sam.quantization.published import TAUS

FLOOR = 1e-20
"""Smallest attention that has a point of its own; others vanish."""
_MANTISSA_BITS = 23
_MANTISSA = (1 << _MANTISSA_BITS) - 1
_EXPONENT = 255 << _MANTISSA_BITS

PointParameters = tuple[Tensor, Tensor, Tensor, Tensor]
"""Scale, middles and powers of `power_table`, and half a step below the last point as a share of
the scale."""


def clamped_codes(x: Tensor, scale: Tensor, middles: Tensor, tau: Tensor, levels: int) -> Tensor:
    """Codes of `x`, 0 to `levels`, int32; the last one stands for zero.

    They are round(-tau * log2(x / scale)) of `x` rounded to float32, exactly. The logarithm of
    2^e m, m from 1 to 2, is e and that of m, which `middles` rounds. What is not a number has
    code 0.

    Args:
        x: any shape.
        scale: [] largest point.
        middles: `code_middles` of tau.
        tau: [] int32.
        levels: number of points.
    """
    return _clamped_codes(x.reshape(-1), scale, middles, tau, levels).reshape(x.shape)


@fused_exactly(near_points(scale_at=1))
def _clamped_codes(x: Tensor, scale: Tensor, middles: Tensor, tau: Tensor, levels: int) -> Tensor:
    bits = divided(x.to(torch.float32).clamp(min=FLOOR), scale).view(torch.int32)
    exponent, mantissa = (bits >> _MANTISSA_BITS) - 127, bits & _MANTISSA
    above = (mantissa >= middles[0]).to(torch.int32)
    for index in range(1, max(TAUS)):
        above = above + (mantissa >= middles[index]).to(torch.int32)
    return (-exponent * tau - above).clamp(0, levels)


def point_parameters(scale: Tensor, tau: Tensor, levels: int) -> PointParameters:
    """What kernels need of the points of a scale [] and tau [].

    The end is not computed within a kernel, which would do so anew for every few elements.
    """
    # Without asking the device for tau.
    row = tau.to(torch.int64).reshape(1)
    middles, powers = (table.index_select(0, row)[0] for table in power_table(scale.device))
    return scale, middles, powers, torch.exp2((0.5 - levels) / tau)


def _nearest_power(x: Tensor, scale: Tensor, middles: Tensor, powers: Tensor) -> Tensor:
    """The power of 2^(1 / tau) that is nearest to x / scale in the logarithm, float32.

    It may be above 1. What is not a number gives infinity.
    """
    bits = divided(x.to(torch.float32).clamp(min=FLOOR), scale).view(torch.int32)
    mantissa = bits & _MANTISSA
    factor = (mantissa >= middles[0]).to(torch.float32) * powers[0]
    for index in range(1, max(TAUS)):
        factor = factor.maximum((mantissa >= middles[index]).to(torch.float32) * powers[index])
    return (bits & _EXPONENT).view(torch.float32) * factor.clamp(min=1)


def _on_points(
    x: Tensor, scale: Tensor, middles: Tensor, powers: Tensor, end: Tensor
) -> tuple[Tensor, Tensor]:
    """The points of `x`, and 1 where it is above the largest one, else 0."""
    power = _nearest_power(x, scale, middles, powers)
    # Numbers, not booleans: on a CPU a choice by booleans takes ten times as long. What is not a
    # number stays so, to be found.
    points = power.clamp(max=1) * (power > end).to(power.dtype) * scale + (x - x)
    return points, (power > 1).to(power.dtype)


def whole_points(
    x: Tensor, scale: Tensor, middles: Tensor, powers: Tensor, end: Tensor, unit: Tensor
) -> Tensor:
    """Points of `x` as whole numbers: those of `point_table`, in the type of `unit`.

    Powers are as exact as that table's entries, and rounded alike.

    Args:
        x: any shape.
        scale: as the others of `point_parameters`.
        middles: see there.
        powers: see there.
        end: see there.
        unit: [] what the scale is, 2^bits; float64 where sums of points are.
    """
    return _whole_points(x.reshape(-1), scale, middles, powers, end, unit).reshape(x.shape)


@fused_exactly(near_points(scale_at=1))
def _whole_points(
    x: Tensor, scale: Tensor, middles: Tensor, powers: Tensor, end: Tensor, unit: Tensor
) -> Tensor:
    power = _nearest_power(x, scale, middles, powers)
    kept = (power > end).to(torch.float32)
    points = (power.clamp(max=1) * kept).to(unit.dtype).mul(unit).round()
    # What is not a number stays so, to be found.
    return points + (x - x).to(unit.dtype)


def to_points(x: Tensor, scale: Tensor, middles: Tensor, powers: Tensor, end: Tensor) -> Tensor:
    """`x` at its points, in its shape and type; see `point_parameters`."""
    return _to_points(x.reshape(-1), scale, middles, powers, end).reshape(x.shape)


@fused_exactly(near_points(scale_at=1))
def _to_points(x: Tensor, scale: Tensor, middles: Tensor, powers: Tensor, end: Tensor) -> Tensor:
    points, _ = _on_points(precise(x), scale, middles, powers, end)
    return points.to(x.dtype)


def batched_points(x: Tensor, scales: Tensor, tau: Tensor, levels: int) -> Tensor:
    """`x` at its points for each of several scales: [scales, ...]; no gradients.

    Args:
        x: any shape.
        scales: [scales].
        tau: [].
        levels: number of points.
    """
    if len(scales) == 1:
        return to_points(x, *point_parameters(scales[0], tau, levels))[None]
    by_scale = scales.reshape(-1, *[1] * x.dim())
    _, middles, powers, end = point_parameters(scales[0], tau, levels)
    points, _ = _on_points(x[None], by_scale, middles, powers, end)
    return points


@fused_exactly(near_points(scale_at=5))
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
    return (slope * gradient).to(x.dtype), summed(above * gradient, scale.shape)


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
    return for_x.to(x.dtype), summed(above * (1 - kept) * gradient, scale.shape)


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
            return to_points(x, *points)
        some = _quantize_some(choice.rows(x), *choice.parts(), *points, in_products(x))
        return some.reshape(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, *points = ctx.saved_tensors
        choice: Choice | None = ctx.choice
        if choice is None:
            for_x, for_scale = _gradients(x.reshape(-1), gradient.reshape(-1), *points)
        else:
            rows, gradient = choice.rows(x), choice.rows(gradient)
            for_x, for_scale = _gradients_of_some(rows, gradient, *choice.parts(), *points)
        return for_x.reshape(x.shape), for_scale, None, None, None, None


def quantize_points(x: Tensor, points: PointParameters, choice: Choice | None) -> Tensor:
    """`x` at its points, but for the elements of a choice, with gradients of `x` and the scale."""
    if choice is None and not torch.is_grad_enabled():
        return to_points(x, *points)
    result: Tensor = _AdaptiveGranularity.apply(  # type: ignore[no-untyped-call]
        x, *points, choice
    )
    return result
