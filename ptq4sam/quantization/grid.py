"""Integer grids and fake quantization: the number formats everything else is built on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptq4sam.errors import ConfigError

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


def along_channels(parameter: Tensor, dimensions: int, channel_axis: int | None) -> Tensor:
    """Shape a scale or zero point so that it broadcasts over a tensor of so many dimensions."""
    if channel_axis is None or parameter.dim() == 0:
        return parameter
    shape = [1] * dimensions
    shape[channel_axis] = -1
    return parameter.reshape(shape)


def affine_codes(
    x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, channel_axis: int | None = None
) -> Tensor:
    """Codes of `x` on the grid: clamp(round(x / scale) + zero point), in the dtype of `x`."""
    scale = along_channels(scale, x.dim(), channel_axis)
    zero_point = along_channels(zero_point, x.dim(), channel_axis)
    return (x / scale).round_().add_(zero_point).clamp_(grid.qmin, grid.qmax)


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
    scale = along_channels(scale, x.dim(), channel_axis)
    zero_point = along_channels(zero_point, x.dim(), channel_axis)
    if not torch.is_grad_enabled():
        return _move_to_grid(x, scale, zero_point, grid)
    result: Tensor = _FakeQuantize.apply(  # type: ignore[no-untyped-call]
        x, scale, zero_point, grid
    )
    return result


_PIECE = 2**16
"""Elements quantized at once on a CPU: with its intermediate results a piece stays in a cache."""


def _pieces(
    parameters: Sequence[Tensor], tensors: Sequence[Tensor]
) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """Views of the same part of tensors of one shape, with that part of their parameters.

    On a CPU a chain of operations over a large tensor waits for memory at each of them; over
    pieces that stay in a cache it does so once.

    Args:
        parameters: scales and the like, of one shape that broadcasts over the tensors.
        tensors: of one shape.
    """
    first, scale = tensors[0], parameters[0]
    elements = first.numel()
    small = first.device.type != "cpu" or elements <= _PIECE
    along_rows = (
        scale.dim() == first.dim() > 0 and scale.numel() == scale.shape[0] == first.shape[0]
    )
    if small or not all(tensor.is_contiguous() for tensor in tensors):
        yield tuple(parameters), tuple(tensors)
    elif scale.numel() == 1:
        own = tuple(parameter.view(()) for parameter in parameters)
        for part in zip(*(tensor.view(-1).split(_PIECE) for tensor in tensors), strict=True):
            yield own, part
    elif along_rows:
        rows = max(1, _PIECE * len(first) // elements)
        yield from zip(
            zip(*(parameter.split(rows) for parameter in parameters), strict=True),
            zip(*(tensor.split(rows) for tensor in tensors), strict=True),
            strict=True,
        )
    else:
        yield tuple(parameters), tuple(tensors)


def _move_to_grid(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    moved = torch.empty_like(x)
    for (step, zero), (values, out) in _pieces([scale, zero_point], [x, moved]):
        torch.div(values, step, out=out)
        out.round_().add_(zero).clamp_(grid.qmin, grid.qmax).sub_(zero).mul_(step)
    return moved


class _FakeQuantize(torch.autograd.Function):
    """Fake quantization that keeps nothing but its inputs for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.grid = grid
        return _move_to_grid(x, scale, zero_point, grid)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        grid, needed = ctx.grid, ctx.needs_input_grad
        for_x = torch.empty_like(x)
        for_scale, for_zero_point = torch.zeros_like(scale), torch.zeros_like(zero_point)
        for (step, zero, scale_sum, zero_sum), (values, gradient, out) in _pieces(
            [scale, zero_point, for_scale, for_zero_point], [x, gradients[0].contiguous(), for_x]
        ):
            ratio = values / step
            codes = ratio.round().add_(zero)
            inside = (codes >= grid.qmin) & (codes <= grid.qmax)
            torch.mul(gradient, inside, out=out)
            if needed[1]:
                multiple = codes.clamp_(grid.qmin, grid.qmax).sub_(zero)
                multiple = multiple.sub_(ratio.mul_(inside)).mul_(gradient)
                scale_sum += multiple.sum_to_size(step.shape)
            if needed[2]:
                zero_sum -= torch.where(inside, 0.0, gradient * step).sum_to_size(step.shape)
        return (
            for_x if needed[0] else None,
            for_scale if needed[1] else None,
            for_zero_point if needed[2] else None,
            None,
        )
