"""Linear and convolution layers on integer codes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq4sam.deploy.codes import UniformGrid, layer_codes, uniform_grid
from ptq4sam.deploy.integer.arithmetic import affine_product, require_narrow
from ptq4sam.errors import DeployError
from ptq4sam.model.layers import QuantizedConv2d, QuantizedLayer, QuantizedLinear
from ptq4sam.quantization.quantizers import Quantizer
from ptq4sam.quantization.whole import rescaled


class IntegerLayer(nn.Module):
    """What both kinds of layer share: codes in, int32 sums, floats or codes out.

    A sum is worth input scale * weight scale, which differs from channel to channel.

    Requantization: a sum is rounded to float32, multiplied by the float32 product of both scales,
    the float32 bias is added, and the result divided by the output's scale and rounded half to
    even. Each operation is rounded to float32, in this order, in the simulation and elsewhere.

    Attributes:
        weight_codes: int16, the weight's shape.
        weight_zero_point: int32 [output channels].
        factor: float32 [output channels], what a sum of 1 is worth.
        bias: float32 [output channels] or None.
    """

    weight_codes: Tensor
    weight_zero_point: Tensor
    factor: Tensor
    bias: Tensor | None

    def __init__(self, layer: QuantizedLayer, name: str) -> None:
        super().__init__()
        weight = layer_codes(layer)
        self.name = name
        self.input_grid = uniform_grid(layer.input_quantizer)
        weight_grid = UniformGrid(1.0, 0, weight.grid)
        require_narrow(name, self.input_grid, weight_grid, terms=layer.weight[0].numel())
        scale, zero_point = weight.by_channel()
        self.register_buffer("weight_codes", weight.codes.to(torch.int16))
        self.register_buffer("weight_zero_point", zero_point.clone())
        self.register_buffer("factor", (layer.input_quantizer.step * scale).clone())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())
        self.input_quantizer = copy.deepcopy(layer.input_quantizer)
        self.output_quantizers = nn.ModuleList()

    def set_output_quantizers(self, quantizers: Sequence[Quantizer]) -> None:
        """Say what `requantize` gives; several share the output channels equally."""
        self.output_quantizers = nn.ModuleList(copy.deepcopy(list(quantizers)))

    def quantize(self, x: Tensor) -> Tensor:
        """Codes of a float input, int32, as the simulation rounds them."""
        return self.input_quantizer.codes(x)

    def accumulate(self, codes: Tensor) -> Tensor:
        """Sums of (input code - zero point) (weight code - zero point), int32."""
        raise NotImplementedError

    def dequantize(self, accumulator: Tensor) -> Tensor:
        """The output in float32."""
        return rescaled(accumulator.float(), self.factor, self.bias)

    def requantize(self, accumulator: Tensor) -> Tensor:
        """The output as int32 codes of `set_output_quantizers`, channels last."""
        parts = self.dequantize(accumulator).chunk(len(self.output_quantizers), dim=-1)
        pairs = zip(self.output_quantizers, parts, strict=True)
        return torch.cat([cast(Quantizer, q).codes(part) for q, part in pairs], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """Float in, float out, with integers between."""
        return self.dequantize(self.accumulate(self.quantize(x)))


class IntegerLinear(IntegerLayer):
    """A linear layer on integer codes: [..., in_features] to [..., out_features]."""

    def accumulate(self, codes: Tensor) -> Tensor:
        """See IntegerLayer."""
        flat = codes.reshape(-1, codes.shape[-1])
        zero_point = self.input_grid.zero_point
        accumulator = affine_product(
            flat, self.weight_codes.t(), zero_point, self.weight_zero_point, torch.int32
        )
        return accumulator.reshape(*codes.shape[:-1], -1)


class IntegerConv2d(IntegerLayer):
    """A convolution on integer codes, padded with the code of zero."""

    def __init__(self, layer: QuantizedConv2d, name: str) -> None:
        super().__init__(layer, name)
        if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            raise DeployError(
                f"{name} has {layer.groups} groups and padding {layer.padding!r} "
                f"({layer.padding_mode}): only one group and zeros have an integer convolution"
            )
        self._window = {
            "kernel_size": layer.kernel_size,
            "dilation": layer.dilation,
            "stride": layer.stride,
        }
        self._padding = layer.padding

    def accumulate(self, codes: Tensor) -> Tensor:
        """See IntegerLayer; [batch, channels, height, width]."""
        rows, columns = self._padding
        zero_point = self.input_grid.zero_point
        padded = F.pad(codes, (columns, columns, rows, rows), value=zero_point)
        # unfold moves floats only, which hold codes exactly.
        windows = F.unfold(padded.float(), **self._window).to(torch.int32)
        accumulator = affine_product(
            self.weight_codes.flatten(1),
            windows,
            self.weight_zero_point[:, None],
            zero_point,
            torch.int32,
        )
        return accumulator.reshape(*accumulator.shape[:2], *self._output_size(padded.shape[-2:]))

    def _output_size(self, padded: Sequence[int]) -> tuple[int, int]:
        reach = zip(*self._window.values(), padded, strict=True)
        height, width = ((n - d * (k - 1) - 1) // s + 1 for k, d, s, n in reach)
        return height, width

    def dequantize(self, accumulator: Tensor) -> Tensor:
        """See IntegerLayer."""
        output = accumulator.float() * self.factor[:, None, None]
        return output if self.bias is None else output + self.bias[:, None, None]


def integer_layer(layer: QuantizedLayer, name: str) -> IntegerLayer:
    """The integer form of a frozen quantized layer.

    Raises:
        DeployError: it has no exact one; the message names it.
    """
    if isinstance(layer, QuantizedLinear):
        return IntegerLinear(layer, name)
    return IntegerConv2d(layer, name)
