"""Layer normalisations, and the form of them that every runtime computes alike.

Runtimes sum in orders of their own and have exponentials and error functions of their own. A
float32 number that differs in its last bit makes another code of a value in the middle of two, and
the network amplifies that until masks differ. So what lies between the quantizers of a quantized
model is made of `quantization/portable.py`'s functions, here and in exported graphs. Sums of codes
need none of this: they are exact (`quantization/whole.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ptq4sam.operators.arithmetic import whole_numbers
from ptq4sam.operators.base import PortableOperator, portable_form
from ptq4sam.operators.watching import unwatched
from ptq4sam.quantization import portable
from ptq4sam.quantization.fused import fused_exactly
from ptq4sam.quantization.hard_numbers import numbers, some_rows


class LayerNorm2d(nn.Module):
    """Layer normalisation over the channels of a [batch, channels, height, width] tensor."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each position; the shape stays."""
        normalized = nn.functional.layer_norm(
            x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, self.eps
        )
        return normalized.permute(0, 3, 1, 2)


@portable_form(nn.LayerNorm)
class PortableLayerNorm(PortableOperator):
    """A layer normalisation over the last axis; parameter names stay."""

    def __init__(self, source: nn.LayerNorm | LayerNorm2d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = source.weight, source.bias, source.eps

    @classmethod
    def of(cls, source: nn.LayerNorm | LayerNorm2d) -> PortableLayerNorm:
        """Made of a float one, with its parameters."""
        return cls(source)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise; shape and dtype stay."""
        if self._is_portable(x):
            return self._forward_portable(x)
        shape = self.weight.shape
        return nn.functional.layer_norm(x, shape, self.weight, self.bias, self.eps)

    @whole_numbers
    def _forward_portable(self, x: Tensor) -> Tensor:
        # As torch's own, whose result lies in order: products of what lies otherwise are rounded
        # otherwise, while something is learned.
        rows = x.contiguous().reshape(-1, x.shape[-1])
        return _norm_of_rows(rows, self.weight, self.bias, self.eps).reshape(x.shape)


@portable_form(LayerNorm2d)
class PortableLayerNorm2d(PortableLayerNorm):
    """A layer normalisation over the channels of [batch, channels, height, width]."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each position; shape and dtype stay."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _hard_rows(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
    yield numbers(some_rows(x)), numbers(weight), numbers(bias), eps


@unwatched()
@fused_exactly(_hard_rows)
def _norm_of_rows(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return portable.layer_norm(x, len(weight), weight, bias, eps)
