"""Activations. A ReLU is the same everywhere and needs no form of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptq4sam.operators.arithmetic import whole_numbers
from ptq4sam.operators.base import PortableOperator, portable_form
from ptq4sam.operators.watching import unwatched
from ptq4sam.quantization import portable
from ptq4sam.quantization.fused import fused_exactly
from ptq4sam.quantization.hard_numbers import many_sizes


@portable_form(nn.GELU)
class PortableGELU(PortableOperator):
    """A GELU by the error function, or approximated by a tangent as the float one was."""

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        self.approximate = approximate

    @classmethod
    def of(cls, source: nn.GELU) -> PortableGELU:
        """Made of a float one."""
        return cls(source.approximate)

    def forward(self, x: Tensor) -> Tensor:
        """Activate each element; shape and dtype stay."""
        if self._is_portable(x):
            return self._forward_portable(x)
        return nn.functional.gelu(x, approximate=self.approximate)

    @whole_numbers
    def _forward_portable(self, x: Tensor) -> Tensor:
        return _gelu(x) if self.approximate == "none" else _gelu_tanh(x)


class ChannelGELU(nn.GELU):
    """A GELU of [batch, channels, height, width], whose channels get factors where it is quantized.

    Args:
        channels: how many there are.
        approximate: as for nn.GELU.
    """

    def __init__(self, channels: int, approximate: str = "none") -> None:
        super().__init__(approximate)
        self.channels = channels


@portable_form(ChannelGELU)
class PortableChannelGELU(PortableGELU):
    """The same, each channel times a power of two: a product that rounds nothing.

    Attributes:
        factors: [channels, 1, 1].
    """

    factors: Tensor

    def __init__(self, channels: int, approximate: str = "none") -> None:
        super().__init__(approximate)
        self.register_buffer("factors", torch.ones(channels, 1, 1))

    @classmethod
    def of(cls, source: nn.GELU) -> PortableChannelGELU:
        """Made of a float one, with factors of 1."""
        assert isinstance(source, ChannelGELU)
        return cls(source.channels, source.approximate)

    def forward(self, x: Tensor) -> Tensor:
        """Activate each element; shape and dtype stay."""
        return super().forward(x) * self.factors.to(x.dtype)


def with_factors(module: nn.Module) -> PortableChannelGELU | None:
    """The same module, where it is an activation with factors."""
    return module if isinstance(module, PortableChannelGELU) else None


@unwatched()
@fused_exactly(many_sizes)
def _gelu(x: Tensor) -> Tensor:
    return portable.gelu(x)


@unwatched()
@fused_exactly(many_sizes)
def _gelu_tanh(x: Tensor) -> Tensor:
    return portable.gelu_tanh(x)
