"""What a deployed model needs of a quantized one: weight codes, scales, zero points.

Everything that leaves the simulation (packed files, the integer reference, exported graphs) takes
its numbers from here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq4sam.errors import DeployError
from ptq4sam.operators.base import QuantizedLayer
from ptq4sam.quantization.grid import Grid, along_channels
from ptq4sam.quantization.groups import GROUPED, ratio_of, step_of
from ptq4sam.quantization.quantizers import Quantizer
from ptq4sam.quantization.slots import HEADS


@dataclass(frozen=True)
class WeightCodes:
    """A weight as integers: the weight is (codes - zero_point) * scale, bit for bit.

    Attributes:
        codes: int32, the weight's shape, values grid.qmin to grid.qmax.
        scale: float32 [output channels], or [] for one in all, or [output channels, groups].
        zero_point: int32, the shape of `scale`.
        grid: bits, and whether codes are signed.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    grid: Grid

    def weight(self) -> Tensor:
        """The weight in float32, computed as the simulation computes it."""
        zero_point = along_channels(self.zero_point, self.codes.shape, 0)
        scale = along_channels(self.scale, self.codes.shape, 0)
        return (self.codes - zero_point).to(scale.dtype) * scale

    @property
    def step(self) -> Tensor:
        """What a whole number of 1 is worth, [output channels] or []."""
        return step_of(self.scale)

    def steps(self) -> Tensor:
        """Whole numbers of steps, int32, the weight's shape."""
        distance = self.codes - along_channels(self.zero_point, self.codes.shape, 0)
        if self.scale.dim() < GROUPED:
            return distance
        ratio = ratio_of(self.scale).to(torch.int32)
        return distance * along_channels(ratio, self.codes.shape, 0)


@dataclass(frozen=True)
class UniformGrid:
    """The grid of an activation: values (code - zero_point) * scale.

    Attributes:
        scale: a float32 number, or float32 [heads] where heads have scales.
        zero_point: the code of zero, or int32 [heads] where they are not all the same.
        grid: bits, and whether codes are signed.
    """

    scale: float | Tensor
    zero_point: int | Tensor
    grid: Grid


@torch.no_grad()
def layer_codes(layer: QuantizedLayer) -> WeightCodes:
    """The weight of a frozen layer as integers.

    Raises:
        DeployError: the weight does not lie on its grid.
        CalibrationError: the layer was not calibrated.
    """
    given = layer.weight_quantizer
    quantizer = given.as_affine()
    if quantizer is None:
        raise DeployError(
            f"{given.name or 'a weight'} has a {type(given).__name__}: only evenly spaced grids "
            "have integer weights"
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
        DeployError: it is no evenly spaced grid with one scale, or one for each head.
        CalibrationError: the quantizer was not calibrated.
    """
    affine = quantizer.as_affine()
    if affine is None or affine.channel_axis not in (None, HEADS):
        raise DeployError(
            f"{quantizer.name or 'an activation'} ({type(quantizer).__name__}) has no evenly "
            "spaced grid with one scale, or one for each head: only such activations can be "
            "deployed"
        )
    scale, zero_point = affine.parameters_in_use()
    if scale.dim() == 0:
        return UniformGrid(float(scale), int(zero_point), affine.grid)
    zero = zero_point.to(torch.int32)
    alike = bool((zero == zero[0]).all())
    return UniformGrid(scale.cpu(), int(zero[0]) if alike else zero.cpu(), affine.grid)
