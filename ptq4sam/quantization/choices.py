"""What a quantizer can be, for searches that try one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq4sam.quantization.grid import MIN_SCALE, Grid

Parameters = tuple[Tensor, Tensor]
"""Scale and zero point."""


@dataclass(frozen=True)
class Choices:
    """What a quantizer can be, in an order.

    Attributes:
        count: how many there are.
        use: be one of them.
        settle: be the best, [] or [channels].
    """

    count: int
    use: Callable[[int], None]
    settle: Callable[[Tensor], None]


def ranges(
    grid: Grid,
    own: Parameters,
    ends: tuple[Tensor, Tensor],
    shares: Sequence[float],
    set_parameters: Callable[[Tensor, Tensor], None],
) -> Choices:
    """Shares of the widest range of evenly spaced points; those that there are come first.

    Args:
        grid: the codes allowed.
        own: what the quantizer has, [] or [channels].
        ends: of the widest range, in that shape or [].
        shares: that are tried.
        set_parameters: tells the quantizer.
    """
    low, high = ends
    found = [own, *(parameters_of(grid, low * share, high * share) for share in shares)]
    scales, zeros = (
        torch.stack([pair[place].detach().expand(own[0].shape) for pair in found])
        for place in (0, 1)
    )

    def use(index: int) -> None:
        set_parameters(scales[index].clone(), zeros[index].clone())

    def settle(best: Tensor) -> None:
        chosen = best.expand(scales.shape[1:])[None]
        scale, zero_point = (x.gather(0, chosen)[0] for x in (scales, zeros))
        set_parameters(scale.clone(), zero_point.clone())

    return Choices(len(scales), use, settle)


def parameters_of(grid: Grid, low: Tensor, high: Tensor) -> Parameters:
    """Scale and zero point of a range; on a symmetric grid the largest size by 2^(bits - 1)."""
    if not grid.symmetric:
        return grid.affine_parameters(low, high)
    scale = torch.maximum(low.abs(), high.abs()) / grid.largest_step
    return scale.clamp(min=MIN_SCALE), torch.zeros_like(scale)
