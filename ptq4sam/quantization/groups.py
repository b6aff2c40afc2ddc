"""Groups of a weight's input channels with scales of their own, on one step an output channel.

Published groups have any scales, so that each needs a product of its own, which is scaled and added
in floating point. Devices multiply bytes with one scale for an output channel. So the scale of a
group is a power of two of the channel's step, as much as leaves all codes within a byte:

    (code - zero point) 2^k s,   0 <= k <= 8 - bits, one less with zero points.

The widest group of a channel has the scale that the channel would have alone; the others are finer
by up to 2^k. All sums are those of one product of whole numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.slots import octaves

GROUPED = 2
"""Dimensions of the scales of groups: [output channels, groups]."""


def group_count(channels: int, size: int) -> int | None:
    """Groups of so many input channels, one where there are fewer; None where some are left."""
    if channels <= size:
        return 1
    return None if channels % size else channels // size


def on_one_step(low: Tensor, scale: Tensor, grid: Grid, channels: int) -> tuple[Tensor, Tensor]:
    """Scales and zero points of groups, with scales that are powers of two of one step.

    Args:
        low: lower ends, [channels * groups].
        scale: that each group would have alone, in that shape.
        grid: the codes allowed.
        channels: output channels.

    Returns:
        Scale and zero point, [channels, groups].
    """
    scale, low = scale.reshape(channels, -1), low.reshape(channels, -1).clamp(max=0)
    widest = octaves(grid.bits, grid.symmetric)
    step = scale.amax(1, keepdim=True) / 2**widest
    mantissa, exponent = torch.frexp(scale / step)
    scale = step * doubled((exponent - (mantissa == 0.5).int()).clamp(0, widest))
    if grid.symmetric:
        return scale, torch.zeros_like(scale)
    return scale, (grid.qmin - torch.round(low / scale)).clamp(grid.qmin, grid.qmax)


def step_of(scale: Tensor) -> Tensor:
    """What all scales of an output channel are powers of two of: [channels] or []."""
    return scale.amin(1) if scale.dim() == GROUPED else scale


def doubled(times: Tensor) -> Tensor:
    """Powers of two, exact, float32."""
    return (torch.ones_like(times, dtype=torch.int32) << times.to(torch.int32)).float()


def octaves_of(scale: Tensor) -> Tensor:
    """How often a channel's step was doubled for each group, uint8 [channels, groups]."""
    return (torch.frexp(ratio_of(scale)).exponent - 1).to(torch.uint8)


def ratio_of(scale: Tensor) -> Tensor:
    """Steps between two points of each group, powers of two, [channels, groups]."""
    return scale / step_of(scale)[:, None]
