"""Activations. A ReLU is the same everywhere and needs no form of its own."""

from __future__ import annotations

from torch import Tensor, nn

from ptq4sam.errors import ConfigError
from ptq4sam.operators.arithmetic import whole_numbers
from ptq4sam.operators.base import PortableOperator, portable_form
from ptq4sam.operators.watching import unwatched
from ptq4sam.quantization import portable
from ptq4sam.quantization.fused import fused_exactly
from ptq4sam.quantization.hard_numbers import many_sizes


@portable_form(nn.GELU)
class PortableGELU(PortableOperator):
    """A GELU by the error function, not by a tangent."""

    @classmethod
    def of(cls, source: nn.GELU) -> PortableGELU:
        """Made of a float one.

        Raises:
            ConfigError: that is an approximation.
        """
        if source.approximate != "none":
            raise ConfigError(f"a GELU approximated by {source.approximate} has no portable form")
        return cls()

    def forward(self, x: Tensor) -> Tensor:
        """Activate each element; shape and dtype stay."""
        return self._forward_portable(x) if self._is_portable(x) else nn.functional.gelu(x)

    @whole_numbers
    def _forward_portable(self, x: Tensor) -> Tensor:
        return _gelu(x)


@unwatched()
@fused_exactly(many_sizes)
def _gelu(x: Tensor) -> Tensor:
    return portable.gelu(x)
