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

    A random byte an element decides, or one bit where all bits of a byte can serve: drawing a float
    for each took longer on a CPU than quantizing it.

    Args:
        quantized: any shape.
        x: of that shape.
        probability: of an element of `x`, to the next 1/256 (the published 1/2 is exact).
        generator: source of the choice; None is torch's own.

    Returns:
        That shape.
    """
    device = x.device
    if probability == 0.5 and x.numel() % 8 == 0:
        drawn = _random_bytes(x.numel() // 8, device, generator)
        bit = (1 << torch.arange(8, device=device)).to(torch.uint8)[:, None]
        by_bit = (8, x.numel() // 8)
        chosen = _choose_by_bit(quantized.reshape(by_bit), x.reshape(by_bit), drawn[None], bit)
        return chosen.reshape(x.shape)
    drawn = _random_bytes(x.numel(), device, generator).view(x.shape)
    limit = min(_STEPS - 1, round(probability * _STEPS))
    return _choose(quantized, x, drawn, limit)


def _random_bytes(count: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    source = device if generator is None else generator.device
    # Eight bytes a draw: a draw takes the same time for one.
    words = torch.empty((count + 7) // 8, dtype=torch.int64, device=source)
    words.random_(-(2**63), None, generator=generator)
    return words.view(torch.uint8)[:count].to(device)


# At weights 0 and 1 lerp is exact, and on a CPU seven times as fast as a choice by booleans.
@fused
def _choose(quantized: Tensor, x: Tensor, drawn: Tensor, limit: int) -> Tensor:
    return torch.lerp(quantized, x, (drawn < limit).to(x.dtype))


@fused
def _choose_by_bit(quantized: Tensor, x: Tensor, drawn: Tensor, bit: Tensor) -> Tensor:
    return torch.lerp(quantized, x, ((drawn & bit) == 0).to(x.dtype))
