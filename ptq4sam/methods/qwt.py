"""A factor and a summand for each output channel of a layer (QwT-v2, Tang et al., 2025).

Behind a layer that gives y' where the float model's gives y, a y' + b with

    a = cov(y, y') / var(y'),  b = E[y] - a E[y']

is nearer to y. The factor goes into the scale of the weight, with which a sum of whole numbers is
multiplied anyway, the summand into the bias: nothing is computed that was not before.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ptq4sam.methods.method import METHODS, Calibration, Method
from ptq4sam.operators.base import QuantizedLayer, quantized_layers
from ptq4sam.quantization.affine import AffineQuantizer
from ptq4sam.quantization.grid import along_channels
from ptq4sam.records import Record


@dataclass(frozen=True)
class OutputAffine(Record):
    """Settings.

    Attributes:
        largest: how far a factor may be from 1.
    """

    largest: float = 0.5

    def _validate(self) -> None:
        self._require(0 < self.largest < 1, "largest", "between 0 and 1")


@dataclass
class OutputMoments:
    """Sums over outputs of both models, float64 [channels].

    Attributes:
        exact: sum of y.
        found: sum of y'.
        products: sum of y y'.
        squares: sum of y'^2.
        exact_squares: sum of y^2.
        count: how many rows.
    """

    exact: Tensor
    found: Tensor
    products: Tensor
    squares: Tensor
    exact_squares: Tensor
    count: int = 0

    @classmethod
    def of(cls, channels: int, device: torch.device) -> OutputMoments:
        """Nothing yet."""
        return cls(*torch.zeros(5, channels, dtype=torch.float64, device=device))

    def add(self, exact: Tensor, found: Tensor) -> None:
        """Take outputs [rows, channels] of both models into account."""
        y, moved = exact.double(), found.double()
        self.exact += y.sum(0)
        self.found += moved.sum(0)
        self.products += (y * moved).sum(0)
        self.squares += moved.square().sum(0)
        self.exact_squares += y.square().sum(0)
        self.count += len(y)

    def affine(self, largest: float) -> tuple[Tensor, Tensor]:
        """Factors and summands of least squared error; 1 where y' does not vary.

        Args:
            largest: how far a factor may be from 1.
        """
        mean, found = self.exact / self.count, self.found / self.count
        covariance = self.products / self.count - mean * found
        variance = self.squares / self.count - found.square()
        tiny = 1e-12 * self.squares / self.count
        factor = torch.where(variance > tiny, covariance / variance.clamp(min=1e-300), 1.0)
        factor = factor.clamp(1 - largest, 1 + largest)
        return factor, mean - factor * found

    def error(self, factor: Tensor | float, summand: Tensor | float) -> Tensor:
        """Mean of (factor y' + summand - y)^2, [channels]."""
        squares = self.exact_squares - 2 * factor * self.products + factor * factor * self.squares
        rest = 2 * summand * (factor * self.found - self.exact)
        return (squares + rest) / self.count + summand * summand


@METHODS.register("qwt-v2")
class OutputAffineMethod(Method[OutputAffine]):
    """Of layers with a scale a channel and a bias, each on what the float model gives it."""

    settings_type = OutputAffine

    def after_reconstruction(self, calibration: Calibration) -> Sequence[str]:
        """Correct layers whose error falls."""
        layers = {name: layer for name, layer in quantized_layers(calibration.sam) if _fits(layer)}
        moments = {
            name: OutputMoments.of(len(layer.weight), layer.weight.device)
            for name, layer in layers.items()
        }
        with ExitStack() as hooks:
            for name, layer in layers.items():
                see = _Seeing(layer, moments[name])
                exact = calibration.exact.get_submodule(name)
                hooks.callback(exact.register_forward_hook(see).remove)
            for item in calibration.items:
                calibration.run_exact(item)
        return [
            name
            for name, layer in layers.items()
            if moments[name].count and self._correct(layer, moments[name])
        ]

    def _correct(self, layer: QuantizedLayer, moments: OutputMoments) -> bool:
        factor, summand = moments.affine(self.settings.largest)
        if float(moments.error(factor, summand).sum()) >= float(moments.error(1.0, 0.0).sum()):
            return False
        fold_affine(layer, factor, summand)
        return True


class _Seeing:
    """A hook of the float model's layer that runs the quantized one on the same input."""

    def __init__(self, layer: QuantizedLayer, moments: OutputMoments) -> None:
        self._layer, self._moments = layer, moments

    def __call__(self, _exact: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found = self._layer(inputs[0])
        rows = (self._layer.by_output(y).flatten(1).t() for y in (output, found))
        self._moments.add(*rows)


def fold_affine(layer: QuantizedLayer, factor: Tensor, summand: Tensor) -> None:
    """Make a frozen layer with a scale a channel give `factor` times its output and `summand`.

    Args:
        layer: its weight lies on its grid; codes stay what they are.
        factor: [channels], positive.
        summand: [channels].
    """
    quantizer, bias = cast(AffineQuantizer, layer.weight_quantizer), cast(Tensor, layer.bias)
    scale, zero_point = quantizer.parameters_in_use()
    codes = quantizer.codes(layer.weight)
    # Not by an assignment: scales of some quantizers are parameters.
    quantizer.set_parameters((scale.double() * factor).to(scale.dtype), zero_point)
    steps = codes - along_channels(zero_point, codes.shape, 0)
    layer.weight.copy_(steps * along_channels(quantizer.step, codes.shape, 0))
    bias.copy_(bias.double() * factor + summand)


def _fits(layer: QuantizedLayer) -> bool:
    quantizer = layer.weight_quantizer.as_affine()
    return quantizer is not None and quantizer.scale.dim() == 1 and layer.bias is not None
