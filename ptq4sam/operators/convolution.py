"""Convolutions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq4sam.errors import ConfigError
from ptq4sam.operators.arithmetic import (
    Arithmetic,
    integer_convolution,
    whole_numbers,
)
from ptq4sam.operators.base import (
    INPUT,
    WEIGHT,
    PortableOperator,
    QuantizedLayer,
    Work,
    portable_form,
    quantizes,
    step_of_sums,
    work,
)
from ptq4sam.quantization import portable
from ptq4sam.quantization.memo import Memo
from ptq4sam.quantization.portable import FIXED, LARGEST_DIGIT, digits, of_digits, power_of_two
from ptq4sam.quantization.quantizers import Quantizer
from ptq4sam.quantization.whole import WholeConvolution, Windows

PIXEL_BOUND = 8.0
"""Normalised pixels are cut to it; SAM's are below 2.7."""


def windows_of(layer: nn.Conv2d) -> Windows:
    """Where a convolution looks.

    Raises:
        ConfigError: it pads with something else than zeros, or by no numbers.
    """
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise ConfigError(
            f"a convolution pads with {layer.padding_mode} by {layer.padding!r}: only zeros by "
            "numbers of rows and columns can be quantized"
        )
    stride, padding, dilation = (
        cast(tuple[int, int], pair) for pair in (layer.stride, layer.padding, layer.dilation)
    )
    return Windows(stride, padding, dilation, layer.groups)


@quantizes(nn.Conv2d)
class QuantizedConv2d(QuantizedLayer):
    """A convolution on quantized input and weight; parameter names stay those of nn.Conv2d."""

    kind = "convolution"

    def __init__(
        self, source: nn.Conv2d, weight_quantizer: Quantizer, input_quantizer: Quantizer
    ) -> None:
        super().__init__(source, weight_quantizer, input_quantizer)
        self.in_channels, self.out_channels = source.in_channels, source.out_channels
        self.kernel_size = cast(tuple[int, int], source.kernel_size)
        self.windows = windows_of(source)
        self._whole: Memo[tuple[WholeConvolution, Tensor]] = Memo()

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, in_channels, height, width] to [batch, out_channels, height', width']."""
        if self._computes_whole():
            return self._forward_whole(x)
        self._whole.clear()
        weight = self.weight_quantizer(self.weight)
        return F.conv2d(self.input_quantizer(x), weight, self.bias, *self.windows.of_torch)

    def by_output(self, output: Tensor) -> Tensor:
        """What it gives, with the outputs of its weight's rows first."""
        return output.movedim(1, 0)

    @whole_numbers
    def _forward_whole(self, x: Tensor) -> Tensor:
        steps = self.input_quantizer(x, steps=True)
        product, step = self._whole.get(self._make_whole, self.sources)
        if self.arithmetic is Arithmetic.INTEGER:
            weight = self.weight_quantizer(self.weight, steps=True)
            sums = integer_convolution(steps, weight, self.windows)
        else:
            sums = product(steps)
        scaled = sums * step.reshape(-1, 1, 1)
        return scaled if self.bias is None else scaled + self.bias[:, None, None]

    def _make_whole(self) -> tuple[WholeConvolution, Tensor]:
        """Sums of products with the weight from the input's steps, and what one is worth."""
        weight: Tensor = self.weight_quantizer(self.weight, steps=True)
        bounds = self.input_quantizer.step_bounds
        return WholeConvolution(weight, *bounds, self.windows), step_of_sums(self)


@quantizes(nn.ConvTranspose2d)
class QuantizedConvTranspose2d(QuantizedConv2d):
    """A transposed convolution whose windows do not overlap, on quantized input and weight.

    Each of its outputs has one input. So it is a convolution of 1 x 1, with an output channel for
    each output channel and place of the kernel, whose outputs are then laid out in squares. Weight
    [out_channels * side^2, in_channels, 1, 1] and bias are held, quantized and exported as such:
    where there is a scale a channel, each place of a kernel has its own.

    Raises:
        ConfigError: windows overlap or are no squares, or there are groups.
    """

    def __init__(
        self, source: nn.ConvTranspose2d, weight_quantizer: Quantizer, input_quantizer: Quantizer
    ) -> None:
        super().__init__(as_convolution(source), weight_quantizer, input_quantizer)
        self.side = int(source.kernel_size[0])

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, in_channels, height, width] to [batch, out_channels, ...], `side` times."""
        return F.pixel_shuffle(super().forward(x), self.side)

    def by_output(self, output: Tensor) -> Tensor:
        """What it gives, with the outputs of its weight's rows first: places of squares apart."""
        return super().by_output(F.pixel_unshuffle(output, self.side))


@torch.no_grad()
def as_convolution(source: nn.ConvTranspose2d) -> nn.Conv2d:
    """The convolution of 1 x 1 whose outputs, laid out in squares, are those of a transposed one.

    Raises:
        ConfigError: there is none.
    """
    side = source.kernel_size[0]
    plain = (
        source.kernel_size == source.stride == (side, side)
        and source.padding == source.output_padding == (0, 0)
        and source.dilation == (1, 1)
        and source.groups == 1
    )
    if not plain:
        raise ConfigError(
            f"a transposed convolution of {source.kernel_size} has steps of {source.stride}, "
            f"padding {source.padding} and {source.groups} group(s): only square ones whose "
            "windows lie side by side, without padding or groups, can be quantized"
        )
    outputs = source.out_channels * side * side
    has_bias = source.bias is not None
    same = nn.Conv2d(source.in_channels, outputs, 1, bias=has_bias, device="meta")
    weight = source.weight.permute(1, 2, 3, 0).reshape(outputs, source.in_channels, 1, 1)
    same.weight = nn.Parameter(weight.contiguous())
    if source.bias is not None:
        same.bias = nn.Parameter(source.bias.repeat_interleave(side * side))
    return same


@portable_form(nn.Conv2d)
class PortableConv2d(PortableOperator):
    """A float convolution of normalised pixels; parameter names stay.

    Pixels and weights have 21 bits, as three digits; products of the smallest are left out.
    """

    def __init__(self, source: nn.Conv2d) -> None:
        super().__init__()
        self.in_channels, self.out_channels = source.in_channels, source.out_channels
        self.kernel_size = cast(tuple[int, int], source.kernel_size)
        self.windows = windows_of(source)
        self.weight, self.bias = source.weight, source.bias
        self._convolutions: Memo[tuple[list[WholeConvolution], float]] = Memo()

    @classmethod
    def of(cls, source: nn.Conv2d) -> PortableConv2d:
        """Made of a float one, with its parameters."""
        return cls(source)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, in_channels, height, width] to [batch, out_channels, rows, columns]."""
        if not self._is_portable(x):
            return F.conv2d(x, self.weight, self.bias, *self.windows.of_torch)
        return self._forward_whole(x)

    @whole_numbers
    def _forward_whole(self, x: Tensor) -> Tensor:
        convolutions, worth = self._convolutions.get(self._make_convolutions, (self.weight,))
        shape = (len(x), self.windows.groups, -1, *x.shape[2:])
        pixels = [digit.reshape(shape) for digit in pixel_digits(x)]
        sums = [
            convolve(torch.cat(pixels[:count], 2).flatten(1, 2))
            for count, convolve in enumerate(convolutions, 1)
        ]
        patches = of_digits(*sums) * worth
        return patches if self.bias is None else patches + self.bias[:, None, None]

    def _make_convolutions(self) -> tuple[list[WholeConvolution], float]:
        """For each digit of the product, and what the first one is worth."""
        weights, worth = weight_digits(self.weight)
        return [
            WholeConvolution(weight, -LARGEST_DIGIT, LARGEST_DIGIT, self.windows)
            for weight in digit_weights(weights)
        ], worth


def pixel_digits(image: portable.X) -> tuple[portable.X, portable.X, portable.X]:
    """Digits of normalised pixels, which are cut to PIXEL_BOUND."""
    return digits((image.clamp(-PIXEL_BOUND, PIXEL_BOUND) * (FIXED / PIXEL_BOUND)).round())


def weight_digits(weight: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], float]:
    """Digits of a first layer's weights, and what 1 in a product of both first digits is worth."""
    bound = power_of_two(float(weight.detach().abs().max()))
    # The first digit counts 2^14 of FIXED.
    worth = (2.0**14 / FIXED) ** 2 * bound * PIXEL_BOUND
    return digits((weight.detach() * (FIXED / bound)).round()), worth


def digit_weights(weights: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """For each digit of the product, what as many first digits of pixels are multiplied with."""
    return [torch.cat(weights[:count][::-1], 1) for count in (1, 2, 3)]


@work(nn.Conv2d, QuantizedConv2d, PortableConv2d, QuantizedConvTranspose2d)
def _work(
    layer: nn.Conv2d | QuantizedConv2d | PortableConv2d,
    inputs: tuple[Tensor, ...],
    output: Tensor,
) -> Iterator[Work]:
    macs = output.numel() * layer.weight[0].numel()
    yield Work("", macs, (INPUT, WEIGHT), ((INPUT, inputs[0].numel()),))


@work(nn.ConvTranspose2d)
def _transposed_work(
    layer: nn.ConvTranspose2d, inputs: tuple[Tensor, ...], output: Tensor
) -> Iterator[Work]:
    # Each input meets one filter; the outputs of the others do.
    macs = inputs[0].numel() * layer.weight[0].numel()
    yield Work("", macs, (INPUT, WEIGHT), ((INPUT, inputs[0].numel()),))
