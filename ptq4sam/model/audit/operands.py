"""Are numbers points of a quantizer's grid, as values or as whole numbers of its steps?"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ptq4sam.methods.adaptive_granularity import AdaptiveGranularityQuantizer
from ptq4sam.methods.granularity_table import point_table
from ptq4sam.quantization.grid import along_channels
from ptq4sam.quantization.quantizers import AffineQuantizer, Quantizer

_ROUNDING = 0.01
"""How far a value may lie from its point, in steps: as much as float32 leaves of 16 bits."""
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
        channel_axis: axis of `x` with a grid for each index; None for one in all.
        factor: what values, but not steps, were multiplied with.

    Returns:
        Booleans of the shape of `x`.
    """
    x = x.double()
    on_grid = _are_steps(x, quantizer, channel_axis)
    return (
        on_grid
        if bool(on_grid.all())
        else on_grid | _are_values(x / factor, quantizer, channel_axis)
    )


def are_digits(x: Tensor) -> bool:
    """Whether all are whole numbers as tables of relative positions are cut into."""
    return bool(((x == x.round()) & (x.abs() <= _LARGEST_DIGIT)).all())


def _are_steps(x: Tensor, quantizer: Quantizer, channel_axis: int | None) -> Tensor:
    if isinstance(quantizer, AdaptiveGranularityQuantizer):
        points = point_table(quantizer.grid.levels, int(quantizer.tau), quantizer.fraction_bits())
        return torch.isin(x, points.to(x))
    if not isinstance(quantizer, AffineQuantizer):
        return quantizer.steps((x * quantizer.step).float()) == x
    return (x == x.round()) & _within(x, quantizer, channel_axis)


def _are_values(x: Tensor, quantizer: Quantizer, channel_axis: int | None) -> Tensor:
    if not isinstance(quantizer, AffineQuantizer):
        exact = x.float()
        return torch.isclose(quantizer.quantize(exact), exact, rtol=1e-5, atol=0)
    scale = along_channels(quantizer.parameters_in_use()[0], x.dim(), channel_axis)
    steps = x / scale
    near = (steps - steps.round()).abs() <= _ROUNDING
    return near & _within(steps.round(), quantizer, channel_axis)


def _within(steps: Tensor, quantizer: AffineQuantizer, channel_axis: int | None) -> Tensor:
    zero_point = along_channels(quantizer.parameters_in_use()[1], steps.dim(), channel_axis)
    codes = steps + zero_point
    return (codes >= quantizer.grid.qmin) & (codes <= quantizer.grid.qmax)
