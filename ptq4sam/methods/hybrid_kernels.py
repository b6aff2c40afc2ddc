"""Kernels of the hybrid grid: its points, their steps, and gradients through them.

Each takes the parts of `HybridNumbers` one by one, as kernels take tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq4sam.methods.hybrid_grid import HybridNumbers, hybrid_steps
from ptq4sam.quantization.base import EPS
from ptq4sam.quantization.fused import fused, fused_exactly
from ptq4sam.quantization.grid import precise, summed
from ptq4sam.quantization.hard_numbers import near_steps


@fused_exactly(near_steps(scale_at=1))
def points(
    x: Tensor,
    step: Tensor,
    inverse: Tensor,
    zero: Tensor,
    ends: Tensor,
    jumps: Tensor,
    knee: Tensor,
    even_step: Tensor,
    inverse_even: Tensor,
    even: int,
) -> Tensor:
    """What numbers become, in their type."""
    numbers = HybridNumbers(step, inverse, zero, ends, jumps, knee, even_step, inverse_even)
    return ((hybrid_steps(precise(x), numbers, even) - zero) * step).to(x.dtype)


@fused_exactly(near_steps(scale_at=1))
def steps(
    x: Tensor,
    step: Tensor,
    inverse: Tensor,
    zero: Tensor,
    ends: Tensor,
    jumps: Tensor,
    knee: Tensor,
    even_step: Tensor,
    inverse_even: Tensor,
    even: int,
) -> Tensor:
    """Steps above the lowest value, whole, float32."""
    numbers = HybridNumbers(step, inverse, zero, ends, jumps, knee, even_step, inverse_even)
    return hybrid_steps(x.float(), numbers, even)


@fused
def gradients(
    x: Tensor,
    gradient: Tensor,
    step: Tensor,
    inverse: Tensor,
    zero: Tensor,
    ends: Tensor,
    jumps: Tensor,
    knee: Tensor,
    even_step: Tensor,
    inverse_even: Tensor,
    even: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `x`, the knee and the even step.

    Straight through both roundings: below the knee points are proportional to `x`, whatever the
    knee; above it u d + s moves with `x` until u is clamped, and then with s and d.
    """
    numbers = HybridNumbers(step, inverse, zero, ends, jumps, knee, even_step, inverse_even)
    point = hybrid_steps(precise(x), numbers, even)
    above = precise(x) * inverse + zero
    # Numbers, not booleans: on a CPU a choice by booleans takes ten times as long.
    in_even = (above > knee).float()
    ratio = (above - knee) * inverse_even
    inside = in_even * (ratio <= even + 0.5).float()
    outside = in_even - inside
    slope = (1 - in_even) * point / above.clamp(min=EPS) + inside
    count = (point - knee) * inverse_even
    for_even = inside * (count - ratio) + outside * even
    nothing = torch.Size(())
    return (
        (slope * gradient).to(x.dtype),
        summed(outside * gradient, nothing),
        summed(for_even * gradient, nothing),
    )
