"""Quantizers with learned scales, and all quantizers by name."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ptq4sam.quantization.affine import AffineQuantizer, FixedQuantizer
from ptq4sam.quantization.base import EPS, Mode, Quantizer
from ptq4sam.quantization.dropping import Choice
from ptq4sam.quantization.grid import Grid, fake_quantize, fake_quantize_some
from ptq4sam.quantization.registry import QUANTIZERS
from ptq4sam.quantization.rounding import AdaRoundQuantizer

__all__ = [
    "EPS",
    "QUANTIZERS",
    "AffineQuantizer",
    "FixedQuantizer",
    "LSQPlusQuantizer",
    "LSQQuantizer",
    "Mode",
    "Quantizer",
]


@QUANTIZERS.register("LSQFakeQuantize")
class LSQQuantizer(AffineQuantizer):
    """The scale is learned, the zero point stays (LSQ, Esser et al. 2020)."""

    scale: nn.Parameter

    def __init__(
        self, grid: Grid, observer: str = "MinMaxObserver", channel_axis: int | None = None
    ) -> None:
        super().__init__(grid, observer, channel_axis)
        self.scale = nn.Parameter(torch.ones(()))

    def learned(self) -> list[nn.Parameter]:
        """The scale."""
        return [self.scale]

    def quantize(self, x: Tensor) -> Tensor:
        """Move `x` to the grid; the scale's gradient is divided by sqrt(numel * qmax)."""
        scale = _scale_gradient(self._positive_scale(), self._gradient_factor(x))
        return fake_quantize(x, scale, self.zero_point, self.grid, self.channel_axis)

    def quantize_some(self, x: Tensor, choice: Choice) -> Tensor:
        """Move `x` to the grid, but for the elements that stay float (QDrop)."""
        if self.scale.dim() > 0:
            return super().quantize_some(x, choice)
        scale = _scale_gradient(self._positive_scale(), self._gradient_factor(x))
        return fake_quantize_some(x, scale, self.zero_point, self.grid, choice)

    @torch.no_grad()
    def parameters_in_use(self) -> tuple[Tensor, Tensor]:
        """Scale, made positive, and zero point, made a code."""
        self._require_calibration()
        return self._positive_scale(), self._code_of_zero().detach()

    def _code_of_zero(self) -> Tensor:
        return self.zero_point

    def _set_parameters(self, scale: Tensor, zero_point: Tensor) -> None:
        super()._set_parameters(scale, zero_point)
        self.constrain_()

    def _positive_scale(self) -> Tensor:
        # Whoever optimises calls constrain_(); this keeps a step in between from harm.
        return self.scale.abs().clamp(min=EPS)

    def _gradient_factor(self, x: Tensor) -> float:
        """1 / sqrt(elements that share a scale * qmax)."""
        return 1.0 / math.sqrt(x.numel() / max(1, self.scale.numel()) * self.grid.qmax)


@QUANTIZERS.register("LSQPlusFakeQuantize")
class LSQPlusQuantizer(LSQQuantizer):
    """Scale and zero point are learned (LSQ+, Bhalgat et al. 2020).

    What it gives is on a grid of whole codes at every step: the zero point is rounded, its gradient
    goes straight through. On a symmetric grid it stays 0.
    """

    zero_point: nn.Parameter

    def __init__(
        self, grid: Grid, observer: str = "MinMaxObserver", channel_axis: int | None = None
    ) -> None:
        super().__init__(grid, observer, channel_axis)
        del self.zero_point
        self.zero_point = nn.Parameter(torch.zeros(()))

    def learned(self) -> list[nn.Parameter]:
        """Scale and zero point."""
        return [self.scale] if self.grid.symmetric else [self.scale, self.zero_point]

    @torch.no_grad()
    def constrain_(self) -> None:
        """Keep the scale positive and the zero point among the codes, where it has a gradient."""
        super().constrain_()
        self.zero_point.clamp_(self.grid.qmin, self.grid.qmax)

    @torch.no_grad()
    def finish_learning(self) -> None:
        """Make the zero point the whole number that it stood for."""
        self.zero_point.copy_(self._code_of_zero())

    def quantize(self, x: Tensor) -> Tensor:
        """Move `x` to the grid; both gradients are divided by sqrt(numel * qmax)."""
        factor = self._gradient_factor(x)
        scale = _scale_gradient(self._positive_scale(), factor)
        zero_point = _scale_gradient(self._code_of_zero(), factor)
        return fake_quantize(x, scale, zero_point, self.grid, self.channel_axis)

    def quantize_some(self, x: Tensor, choice: Choice) -> Tensor:
        """Move `x` to the grid, but for the elements that stay float (QDrop)."""
        return choice.mix(self.quantize(x), x)

    def _set_parameters(self, scale: Tensor, zero_point: Tensor) -> None:
        own = self.zero_point
        own.data = zero_point
        super()._set_parameters(scale, own)

    def _code_of_zero(self) -> Tensor:
        # Between the steps of an optimiser it is no whole number; the grid needs one.
        rounded: Tensor = _RoundStraightThrough.apply(  # type: ignore[no-untyped-call]
            self.zero_point
        )
        return rounded.clamp(self.grid.qmin, self.grid.qmax)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


class _RoundStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def _scale_gradient(x: Tensor, factor: float) -> Tensor:
    """`x` itself, whose gradient is multiplied by `factor`."""
    if not torch.is_grad_enabled():
        return x
    result: Tensor = _ScaleGradient.apply(x, factor)  # type: ignore[no-untyped-call]
    return result


QUANTIZERS.register("FixedFakeQuantize")(FixedQuantizer)
QUANTIZERS.register("AdaRoundFakeQuantize")(AdaRoundQuantizer)
