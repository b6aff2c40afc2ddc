"""Random choice of elements that stay float (QDrop, Wei et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq4sam.quantization.fused import fused

_STEPS = 256


@dataclass(frozen=True)
class Choice:
    """Which elements of a tensor stay float: those whose `drawn & mask` is below `limit`.

    The tensor is looked at as [rows, n], as `rows` gives it, so that one random byte can serve
    eight elements.

    Attributes:
        drawn: [1, n] random bytes.
        mask: [rows, 1] bytes, the bits that decide for a row.
        limit: 1 to 255.
    """

    drawn: Tensor
    mask: Tensor
    limit: int

    def rows(self, x: Tensor) -> Tensor:
        """`x` as [rows, n]."""
        return x.reshape(self.mask.shape[0], -1)

    def parts(self) -> tuple[Tensor, Tensor, int]:
        """For functions marked `@fused`, which take tensors and integers."""
        return self.drawn, self.mask, self.limit

    def mix(self, quantized: Tensor, x: Tensor) -> Tensor:
        """Elements of `x` where they stay float, else those of `quantized`, in their shape."""
        mixed = _mix(self.rows(quantized), self.rows(x), *self.parts())
        return mixed.reshape(x.shape)


def choose(x: Tensor, probability: float, generator: torch.Generator | None) -> Choice:
    """Choose elements of `x` that stay float.

    A random byte an element decides, or one bit where all bits of a byte can serve: drawing a float
    for each took longer on a CPU than quantizing it.

    Args:
        x: any shape.
        probability: of an element staying float, to the next 1/256 (the published 1/2 is exact).
        generator: source of the choice; None is torch's own.
    """
    if probability == 0.5 and x.numel() % 8 == 0:
        drawn = _random_bytes(x.numel() // 8, x.device, generator)
        return Choice(drawn[None], (1 << torch.arange(8, device=x.device)).byte()[:, None], 1)
    drawn = _random_bytes(x.numel(), x.device, generator)
    limit = max(1, min(_STEPS - 1, round(probability * _STEPS)))
    return Choice(drawn[None], drawn.new_full((1, 1), _STEPS - 1), limit)


def keep_some_float(
    quantized: Tensor, x: Tensor, probability: float, generator: torch.Generator | None
) -> Tensor:
    """Replace elements of `quantized` by those of `x`, chosen at random; see `choose`."""
    return choose(x, probability, generator).mix(quantized, x)


def stays_float(drawn: Tensor, mask: Tensor, limit: int) -> Tensor:
    """1 where an element of a `Choice` stays float, else 0, float32 [rows, n].

    Numbers, not booleans: on a CPU a choice by booleans takes several times as long.
    """
    return ((drawn & mask) < limit).float()


@fused
def _mix(quantized: Tensor, x: Tensor, drawn: Tensor, mask: Tensor, limit: int) -> Tensor:
    # At weights 0 and 1 lerp is exact.
    return torch.lerp(quantized, x, stays_float(drawn, mask, limit).to(x.dtype))


def _random_bytes(count: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    source = device if generator is None else generator.device
    # Eight bytes a draw: a draw takes the same time for one.
    words = torch.empty((count + 7) // 8, dtype=torch.int64, device=source)
    words.random_(-(2**63), None, generator=generator)
    return words.view(torch.uint8)[:count].to(device)
