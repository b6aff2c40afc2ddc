"""Random choice of elements that stay float (QDrop, Wei et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq4sam.quantization.fused import fused

_WORD = 32


@dataclass(frozen=True)
class Choice:
    """Which elements of a tensor stay float: those where (drawn >> shift) & mask is below limit.

    The tensor is looked at as [rows, n], as `rows` gives it, so that one random word can serve 32
    elements.

    Attributes:
        drawn: [1, n] random words, int32.
        shift: [rows, 1], int32, which bits of a word decide for a row.
        mask: 2^b - 1 where b bits decide.
        limit: 1 to mask; an element stays float with probability limit / (mask + 1).
    """

    drawn: Tensor
    shift: Tensor
    mask: int
    limit: int

    def rows(self, x: Tensor) -> Tensor:
        """`x` as [rows, n]."""
        return x.reshape(self.shift.shape[0], -1)

    def parts(self) -> tuple[Tensor, Tensor, int, int]:
        """For functions marked `@fused`, which take tensors and integers."""
        return self.drawn, self.shift, self.mask, self.limit

    def mix(self, quantized: Tensor, x: Tensor) -> Tensor:
        """Elements of `x` where they stay float, else those of `quantized`, in their shape."""
        mixed = _mix(self.rows(quantized), self.rows(x), *self.parts())
        return mixed.reshape(x.shape)


def choose(x: Tensor, probability: float, generator: torch.Generator | None) -> Choice:
    """Choose elements of `x` that stay float.

    Eight random bits an element decide, or one where 32 elements can share a word: drawing a float
    for each took longer on a CPU than quantizing it.

    Args:
        x: any shape.
        probability: of an element staying float, to the next 1/256 (the published 1/2 is exact).
        generator: source of the choice; None is torch's own.
    """
    count, device = x.numel(), x.device
    bits = 1 if probability == 0.5 else 8
    rows = _WORD // bits
    if count % rows:
        rows = 1
    shift = torch.arange(0, bits * rows, bits, dtype=torch.int32, device=device)[:, None]
    mask = (1 << bits) - 1
    limit = max(1, min(mask, round(probability * (mask + 1))))
    return Choice(_random_words(count // rows, device, generator)[None], shift, mask, limit)


def keep_some_float(
    quantized: Tensor, x: Tensor, probability: float, generator: torch.Generator | None
) -> Tensor:
    """Replace elements of `quantized` by those of `x`, chosen at random; see `choose`."""
    return choose(x, probability, generator).mix(quantized, x)


def stays_float(drawn: Tensor, shift: Tensor, mask: int, limit: int) -> Tensor:
    """1 where an element of a `Choice` stays float, else 0, float32 [rows, n].

    Numbers, not booleans: on a CPU a choice by booleans takes several times as long.
    """
    return (((drawn >> shift) & mask) < limit).float()


def chosen(quantized: Tensor, x: Tensor, kept: Tensor) -> Tensor:
    """`x` where `kept` is 1, `quantized` where it is 0, exactly.

    torch.lerp has two formulas, between which a kernel has to choose: it takes half as long again.
    """
    return quantized * (1 - kept) + x * kept


@fused
def _mix(
    quantized: Tensor, x: Tensor, drawn: Tensor, shift: Tensor, mask: int, limit: int
) -> Tensor:
    return chosen(quantized, x, stays_float(drawn, shift, mask, limit).to(x.dtype))


def _random_words(count: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    source = device if generator is None else generator.device
    # Eight bytes a draw: a draw takes the same time for one.
    words = torch.empty((count + 1) // 2, dtype=torch.int64, device=source)
    words.random_(-(2**63), None, generator=generator)
    return words.view(torch.int32)[:count].to(device)
