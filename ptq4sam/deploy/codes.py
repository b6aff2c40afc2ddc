"""What a deployed model needs of a quantized one: weight codes, scales, zero points, tau.

Everything that leaves the simulation (packed files, the integer reference, exported graphs) takes
its numbers from here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq4sam.errors import DeployError
from ptq4sam.methods.adaptive_granularity import AdaptiveGranularityQuantizer
from ptq4sam.operators.base import QuantizedLayer
from ptq4sam.quantization.base import AffineQuantizer
from ptq4sam.quantization.grid import Grid, along_channels
from ptq4sam.quantization.quantizers import Quantizer


@dataclass(frozen=True)
class WeightCodes:
    """A weight as integers: the weight is (codes - zero_point) * scale, bit for bit.

    Attributes:
        codes: int32, the weight's shape, values grid.qmin to grid.qmax.
        scale: float32 [output channels], or [] for one in all.
        zero_point: int32, the shape of `scale`.
        grid: bits, and whether codes are signed.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    grid: Grid

    def weight(self) -> Tensor:
        """The weight in float32, computed as the simulation computes it."""
        dimensions = self.codes.dim()
        zero_point = along_channels(self.zero_point, dimensions, 0)
        scale = along_channels(self.scale, dimensions, 0)
        return (self.codes - zero_point).to(scale.dtype) * scale

    def by_channel(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, [output channels] each, whatever the granularity."""
        channels = self.codes.shape[0]
        return self.scale.expand(channels), self.zero_point.expand(channels)


@dataclass(frozen=True)
class UniformGrid:
    """The grid of an activation: values (code - zero_point) * scale.

    Attributes:
        scale: a float32 number.
        zero_point: the code of zero.
        grid: bits, and whether codes are signed.
    """

    scale: float
    zero_point: int
    grid: Grid


@dataclass(frozen=True)
class LogGrid:
    """The grid of a softmax output under adaptive granularity: values scale * 2^(-code / tau).

    Attributes:
        scale: a float32 number, the largest point.
        tau: 1, 2 or 4.
        grid: codes 0 to qmax; a code above qmax stands for 0.
    """

    scale: float
    tau: int
    grid: Grid


@torch.no_grad()
def layer_codes(layer: QuantizedLayer) -> WeightCodes:
    """The weight of a frozen layer as integers.

    Raises:
        DeployError: the weight does not lie on its grid.
        CalibrationError: the layer was not calibrated.
    """
    quantizer = layer.weight_quantizer
    if not isinstance(quantizer, AffineQuantizer):
        raise DeployError(
            f"{quantizer.name or 'a weight'} has a {type(quantizer).__name__}: only evenly spaced "
            "grids have integer weights"
        )
    scale, zero_point = quantizer.parameters_in_use()
    codes = WeightCodes(
        quantizer.codes(layer.weight), scale, zero_point.to(torch.int32), quantizer.grid
    )
    if not torch.equal(codes.weight(), layer.weight):
        raise DeployError(
            f"{quantizer.name or 'a weight'} is not on its grid: freeze the model (quantize with "
            "compat: faithful) before it is saved or deployed"
        )
    return codes


def uniform_grid(quantizer: Quantizer) -> UniformGrid:
    """The grid of an activation.

    Raises:
        DeployError: it is no evenly spaced grid with one scale.
        CalibrationError: the quantizer was not calibrated.
    """
    if not isinstance(quantizer, AffineQuantizer) or quantizer.channel_axis is not None:
        raise DeployError(
            f"{quantizer.name or 'an activation'} ({type(quantizer).__name__}) has no evenly "
            "spaced grid with one scale: only such activations can be deployed"
        )
    scale, zero_point = quantizer.parameters_in_use()
    return UniformGrid(float(scale), int(zero_point), quantizer.grid)


def softmax_grid(quantizer: Quantizer) -> UniformGrid | LogGrid:
    """The grid of a softmax output, of either kind; errors as for `uniform_grid`."""
    if isinstance(quantizer, AdaptiveGranularityQuantizer):
        return LogGrid(float(quantizer.scale_in_use()), int(quantizer.tau), quantizer.grid)
    return uniform_grid(quantizer)
