"""Are numbers points of a quantizer's grid, as values or as whole numbers of its steps?"""

from __future__ import annotations

import math

from torch import Tensor

from ptq4sam.quantization.quantizers import Quantizer

_LARGEST_DIGIT = 64


def sample(x: Tensor, most: int, channel_axis: int | None = None) -> Tensor:
    """At most so many numbers of a tensor, from everywhere in it, in all of its channels."""
    kept = None if channel_axis is None else channel_axis % x.dim()
    axes = [axis for axis in range(x.dim()) if axis != kept]
    for axis in sorted(axes, key=lambda axis: x.shape[axis], reverse=True):
        step = min(x.shape[axis], math.ceil(x.numel() / most))
        if step > 1:
            x = x[(slice(None),) * axis + (slice(None, None, step),)]
    return x


def is_on_grid(
    x: Tensor, quantizer: Quantizer, channel_axis: int | None = None, factor: float = 1.0
) -> Tensor:
    """Which numbers are points.

    Args:
        x: operand of a product.
        quantizer: has the grid.
        channel_axis: axis of `x` with a grid for each index; None for one in all. Of grids that
            belong to other axes all whole steps that one of them has are points.
        factor: what values, but not steps, were multiplied with.

    Returns:
        Booleans of the shape of `x`.
    """
    x, grid = x.double(), quantizer.grid_in_use()
    if grid.step.numel() not in (1, 0 if channel_axis is None else x.shape[channel_axis]):
        # Some of the channels, as a convolution by groups multiplies them, or some of the heads.
        largest = max(map(abs, quantizer.step_bounds))
        return (x == x.round()) & (x.abs() <= largest)
    on_grid = grid.holds_steps(x, channel_axis)
    return on_grid if bool(on_grid.all()) else on_grid | grid.holds(x / factor, channel_axis)


def are_digits(x: Tensor) -> bool:
    """Whether all are whole numbers as tables of relative positions are cut into."""
    return bool(((x == x.round()) & (x.abs() <= _LARGEST_DIGIT)).all())
