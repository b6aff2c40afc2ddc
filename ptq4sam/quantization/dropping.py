"""Random choice of elements that stay float (QDrop, Wei et al. 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from ptq4sam.quantization.fused import fused

_STEPS = 256


def keep_some_float(
    quantized: Tensor, x: Tensor, probability: float, generator: torch.Generator | None
) -> Tensor:
    """Replace elements of `quantized` by those of `x`, chosen at random.

    A byte an element decides, so that eight elements share one draw of the generator: drawing a
    float for each took longer on a CPU than quantizing it.

    Args:
        quantized: any shape.
        x: of that shape.
        probability: of an element of `x`, to the next 1/256 (the published 1/2 is exact).
        generator: source of the choice; None is torch's own.

    Returns:
        That shape.
    """
    source = x.device if generator is None else generator.device
    words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=source)
    words.random_(-(2**63), None, generator=generator)
    limit = min(_STEPS - 1, round(probability * _STEPS))
    drawn = words.view(torch.uint8)[: x.numel()].view(x.shape).to(x.device)
    return _choose(quantized, x, drawn, limit)


@fused
def _choose(quantized: Tensor, x: Tensor, drawn: Tensor, limit: int) -> Tensor:
    # At weights 0 and 1 this is exact, and on a CPU seven times as fast as a choice by booleans.
    return torch.lerp(quantized, x, (drawn < limit).to(x.dtype))
