"""Integer grids and fake quantization: the number formats everything else is built on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptq4sam.errors import ConfigError
from ptq4sam.quantization.division import divided
from ptq4sam.quantization.dropping import Choice, chosen, stays_float
from ptq4sam.quantization.fused import fused, fused_exactly
from ptq4sam.quantization.hard_numbers import near_steps
from ptq4sam.quantization.slots import HEADS

MIN_SCALE = 1e-8
"""Smallest scale a range can give; a tensor of zeros would have none otherwise."""


@dataclass(frozen=True)
class Grid:
    """The integers that codes of a tensor may take.

    Attributes:
        bits: bits of a code, 2 to 16.
        symmetric: signed codes with zero point 0; else unsigned codes with a zero point.

    Raises:
        ConfigError: `bits` is outside 2 to 16.
    """

    bits: int
    symmetric: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise ConfigError(f"a grid of {self.bits} bits was asked for: use 2 to 16 bits")

    @property
    def levels(self) -> int:
        """How many codes there are."""
        return 1 << self.bits

    @property
    def largest_step(self) -> int:
        """How many steps a code is away from that of zero at most."""
        return self.levels // 2 if self.symmetric else self.levels - 1

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return -(self.levels // 2) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        """Largest code."""
        return self.qmin + self.levels - 1

    def affine_parameters(self, minimum: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point for a range, which is extended to contain 0.

        Args:
            minimum: lower ends, any shape, in the units of the data.
            maximum: upper ends, the same shape.

        Returns:
            scale (at least MIN_SCALE) and zero point (a code, as floating point), of that shape.
        """
        low = minimum.clamp(max=0)
        high = maximum.clamp(min=0)
        steps = self.qmax - self.qmin
        if self.symmetric:
            scale = (torch.maximum(-low, high) / (steps / 2)).clamp(min=MIN_SCALE)
            return scale, torch.zeros_like(scale)
        scale = ((high - low) / steps).clamp(min=MIN_SCALE)
        zero_point = (self.qmin - torch.round(low / scale)).clamp(self.qmin, self.qmax)
        return scale, zero_point

    def affine_numbers(self, minimum: float, maximum: float) -> tuple[float, float]:
        """`affine_parameters` of one range in float64, for searches that try thousands of them.

        Of an asymmetric grid alone: a tensor of one element takes fifty times as long as a number.
        """
        low, steps = min(minimum, 0.0), self.levels - 1
        scale = max((max(maximum, 0.0) - low) / steps, MIN_SCALE)
        return scale, float(min(max(-round(low / scale), 0), steps))


def along_channels(parameter: Tensor, shape: torch.Size, channel_axis: int | None) -> Tensor:
    """Shape a scale or zero point so that it broadcasts over a tensor.

    Args:
        parameter: [], [channels], or [channels, groups] of a weight's output and input channels.
        shape: of the tensor.
        channel_axis: of it; None for one in all.
    """
    if channel_axis is None or parameter.dim() == 0:
        return parameter
    if parameter.dim() == 1:
        sides = [1] * len(shape)
        sides[channel_axis] = -1
        return parameter.reshape(sides)
    each = parameter.repeat_interleave(shape[1] // parameter.shape[1], 1)
    return each.reshape(*each.shape, *[1] * (len(shape) - 2))


def _spread(
    x: Tensor, scale: Tensor, zero_point: Tensor, channel_axis: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`x`, and a scale and a zero point that broadcast over it.

    Heads are made rows: what is compiled for weights (`fused`) serves them too.

    Returns:
        `x` as it is, or [batch * heads, ...] of [batch, heads, ...].

    Raises:
        ConfigError: there are not as many heads as scales.
    """
    if channel_axis == HEADS and scale.dim() > 0:
        if x.dim() <= HEADS or len(scale) != x.shape[HEADS]:
            raise ConfigError(
                f"a tensor {list(x.shape)} came to {len(scale)} scales, one a head of [batch, "
                "heads, ...]: quantize the model anew"
            )
        batch, channel_axis = len(x), 0
        x, scale, zero_point = x.flatten(0, 1), scale.repeat(batch), zero_point.repeat(batch)
    scale, zero_point = (along_channels(p, x.shape, channel_axis) for p in (scale, zero_point))
    return x, scale, zero_point


def affine_codes(
    x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, channel_axis: int | None = None
) -> Tensor:
    """Codes of `x` on the grid: clamp(round(x / scale) + zero point), at least float32."""
    rows, scale, zero_point = _spread(x, scale, zero_point, channel_axis)
    return _codes(precise(rows), scale, zero_point, grid.qmin, grid.qmax).reshape(x.shape)


def _codes(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    return divided(x, scale).round_().add_(zero_point).clamp_(qmin, qmax)


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, channel_axis: int | None = None
) -> Tensor:
    """Move `x` to the nearest point of a grid: (clamp(round(x/s) + z, qmin, qmax) - z) * s.

    Rounds half to even. Gradients go straight through the rounding and reach `x`, the scale and
    the zero point (LSQ, Esser et al. 2020; LSQ+, Bhalgat et al. 2020).

    Args:
        x: any shape.
        scale: one value, or one for each index of `channel_axis`.
        zero_point: the same shape.
        grid: the codes allowed.
        channel_axis: axis of `x` that the scales belong to; None for one scale in all.

    Returns:
        The shape of `x`.
    """
    rows, scale, zero_point = _spread(x, scale, zero_point, channel_axis)
    if not torch.is_grad_enabled():
        return _move_to_grid(rows, scale, zero_point, grid.qmin, grid.qmax).reshape(x.shape)
    result: Tensor = _FakeQuantize.apply(  # type: ignore[no-untyped-call]
        rows, scale, zero_point, grid
    )
    return result.reshape(x.shape)


def in_products(x: Tensor) -> Tensor:
    """A single number of the dtype that matrix products with `x` are computed in here.

    Under autocast that is another one than the tensor's own. To write it at once spares a product
    a pass over its operands.
    """
    kind = x.device.type
    lower = torch.is_autocast_enabled(kind)
    return x.new_empty((), dtype=torch.get_autocast_dtype(kind) if lower else x.dtype)


def precise(x: Tensor) -> Tensor:
    """At least float32: codes of a bfloat16 tensor would be wrong near the middle of two."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def summed(x: Tensor, shape: torch.Size) -> Tensor:
    """Sum to a shape, rounded once.

    In float64, whose own rounding cannot be seen behind that: kernels add in an order that depends
    on the device and on the shape that they were first compiled for.
    """
    return x.double().sum_to_size(shape).to(x.dtype)


@fused_exactly(near_steps(scale_at=1))
def _move_to_grid(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    codes = _codes(precise(x), scale, zero_point, qmin, qmax)
    return codes.sub_(zero_point).mul_(scale).to(x.dtype)


def steps_from_zero(
    x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, channel_axis: int | None = None
) -> Tensor:
    """Codes of `x`, rounded to float32, less the zero point, as float32; no gradients."""
    rows, scale, zero_point = _spread(x, scale, zero_point, channel_axis)
    return _steps_from_zero(rows, scale, zero_point, grid.qmin, grid.qmax).reshape(x.shape)


@fused_exactly(near_steps(scale_at=1))
def _steps_from_zero(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    return _codes(x.to(torch.float32), scale, zero_point, qmin, qmax).sub_(zero_point)


@fused
def _gradient(
    x: Tensor, gradient: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int
) -> Tensor:
    """Gradient of `x`: straight through where the code is not clamped."""
    unclamped = divided(precise(x), scale).round_().add_(zero_point)
    # As 0 and 1 in floating point: on a CPU a choice by booleans takes ten times as long.
    return unclamped.eq_(unclamped.clamp(qmin, qmax)).mul_(gradient).to(x.dtype)


@fused
def _gradients(
    x: Tensor, gradient: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int
) -> tuple[Tensor, Tensor]:
    """Gradients of `x` and of the scale."""
    ratio = divided(precise(x), scale)
    unclamped = ratio.round().add_(zero_point)
    codes = unclamped.clamp(qmin, qmax)
    inside = unclamped.eq_(codes)
    # Not addcmul, of which the compiler makes slower code.
    multiple = codes.sub_(zero_point) - ratio * inside
    for_scale = summed(multiple.mul_(gradient), scale.shape)
    return inside.mul_(gradient).to(x.dtype), for_scale


class _FakeQuantize(torch.autograd.Function):
    """Fake quantization that keeps nothing but its inputs for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.grid = grid
        return _move_to_grid(x, scale, zero_point, grid.qmin, grid.qmax)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, scale, zero_point = ctx.saved_tensors
        arguments = (x, gradient, scale, zero_point, ctx.grid.qmin, ctx.grid.qmax)
        for_x = for_scale = for_zero_point = None
        if ctx.needs_input_grad[1]:
            for_x, for_scale = _gradients(*arguments)
        elif ctx.needs_input_grad[0]:
            for_x = _gradient(*arguments)
        if ctx.needs_input_grad[2]:
            outside = _gradient(x, torch.ones_like(x), *arguments[2:]).sub_(1)
            for_zero_point = outside.mul_(gradient).mul_(scale).sum_to_size(zero_point.shape)
        return for_x, for_scale, for_zero_point, None


def fake_quantize_some(
    x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, choice: Choice
) -> Tensor:
    """As `fake_quantize` with one scale, but for the elements that stay float (QDrop).

    One pass over memory forward and one backward, where quantizing and choosing take two each.
    The zero point gets no gradient.
    """
    result: Tensor = _FakeQuantizeSome.apply(  # type: ignore[no-untyped-call]
        x, scale, zero_point, grid, choice
    )
    return result


@fused_exactly(near_steps(scale_at=5))
def _move_some_to_grid(
    x: Tensor,
    drawn: Tensor,
    shift: Tensor,
    mask: int,
    limit: int,
    scale: Tensor,
    zero_point: Tensor,
    like: Tensor,
    qmin: int,
    qmax: int,
) -> Tensor:
    codes = _codes(precise(x), scale, zero_point, qmin, qmax)
    quantized = codes.sub_(zero_point).mul_(scale)
    kept = stays_float(drawn, shift, mask, limit)
    return chosen(quantized, precise(x), kept).to(like.dtype)


@fused
def _gradients_of_some(
    x: Tensor,
    gradient: Tensor,
    drawn: Tensor,
    shift: Tensor,
    mask: int,
    limit: int,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of `x` and of the scale."""
    kept = stays_float(drawn, shift, mask, limit)
    ratio = divided(precise(x), scale)
    unclamped = ratio.round().add_(zero_point)
    codes = unclamped.clamp(qmin, qmax)
    inside = unclamped.eq_(codes)
    multiple = codes.sub_(zero_point) - ratio * inside
    for_scale = summed((multiple * (1 - kept)).mul_(gradient), torch.Size(()))
    return torch.maximum(inside, kept).mul_(gradient).to(x.dtype), for_scale


class _FakeQuantizeSome(torch.autograd.Function):
    """Fake quantization of some elements; it keeps nothing but its input and random bytes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, choice: Choice
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.grid, ctx.choice = grid, choice
        like = in_products(x)
        parameters = (*choice.parts(), scale, zero_point, like, grid.qmin, grid.qmax)
        return _move_some_to_grid(choice.rows(x), *parameters).reshape(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        choice, grid = ctx.choice, ctx.grid
        parameters = (*choice.parts(), scale, zero_point, grid.qmin, grid.qmax)
        gradient = choice.rows(gradients[0])
        for_x, for_scale = _gradients_of_some(choice.rows(x), gradient, *parameters)
        return for_x.reshape(x.shape), for_scale.reshape(scale.shape), None, None, None
