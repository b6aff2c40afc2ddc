"""Linear and convolution layers whose weight and input pass through quantizers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ptq4sam.model.watching import unwatched
from ptq4sam.progress import Progress, silent
from ptq4sam.quantization.memo import Memo
from ptq4sam.quantization.modes import quantizer_mode
from ptq4sam.quantization.quantizers import Mode, Quantizer
from ptq4sam.quantization.whole import WholeConvolution, WholeLinear, Windows, rescaled


@dataclass(frozen=True)
class _Whole:
    """What a forward on whole numbers needs of a layer's parameters.

    Attributes:
        product: sums of products with the weight, from the input's steps.
        step: what a sum of 1 is worth, [channels] or [].
    """

    product: WholeLinear | WholeConvolution
    step: Tensor


class QuantizedLinear(nn.Linear):
    """A linear layer on quantized input and weight; parameter names stay those of nn.Linear."""

    def __init__(
        self, source: nn.Linear, weight_quantizer: Quantizer, input_quantizer: Quantizer
    ) -> None:
        super().__init__(source.in_features, source.out_features, device="meta")
        self.weight, self.bias = source.weight, source.bias
        self.weight_quantizer = weight_quantizer
        self.input_quantizer = input_quantizer
        self._whole: Memo[_Whole] = Memo()

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features]."""
        if computes_whole(x, self.weight_quantizer, self.input_quantizer):
            whole = self._whole.get(self._make_whole, _sources(self))
            sums = whole.product(self.input_quantizer(x, steps=True))
            with unwatched():
                return rescaled(sums, whole.step, self.bias)
        self._whole.clear()
        weight = self.weight_quantizer(self.weight)
        return nn.functional.linear(self.input_quantizer(x), weight, self.bias)

    def _make_whole(self) -> _Whole:
        weight: Tensor = self.weight_quantizer(self.weight, steps=True)
        product = WholeLinear(weight, *self.input_quantizer.step_bounds)
        return _Whole(product, step_of_sums(self))


class QuantizedConv2d(nn.Conv2d):
    """A convolution on quantized input and weight; parameter names stay those of nn.Conv2d."""

    def __init__(
        self, source: nn.Conv2d, weight_quantizer: Quantizer, input_quantizer: Quantizer
    ) -> None:
        nn.Module.__init__(self)
        # Sizes, stride, padding, weight and bias are the source's own: a convolution has too many
        # options to name them all here without forgetting one.
        self.__dict__.update(
            {name: value for name, value in vars(source).items() if not name.startswith("_")}
        )
        self._reversed_padding_repeated_twice = source._reversed_padding_repeated_twice
        self.weight, self.bias = source.weight, source.bias
        self.weight_quantizer = weight_quantizer
        self.input_quantizer = input_quantizer
        self._whole: Memo[_Whole] = Memo()

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, in_channels, height, width] to [batch, out_channels, height', width']."""
        if computes_whole(x, self.weight_quantizer, self.input_quantizer) and self._is_plain:
            whole = self._whole.get(self._make_whole, _sources(self))
            sums = whole.product(self.input_quantizer(x, steps=True))
            bias = None if self.bias is None else self.bias[:, None, None]
            scaled = sums * whole.step.reshape(-1, 1, 1)
            return scaled if bias is None else scaled + bias
        self._whole.clear()
        weight = self.weight_quantizer(self.weight)
        convolved: Tensor = self._conv_forward(self.input_quantizer(x), weight, self.bias)
        return convolved

    def _make_whole(self) -> _Whole:
        weight: Tensor = self.weight_quantizer(self.weight, steps=True)
        pairs = (self.stride, self.padding, self.dilation)
        windows = Windows(*(cast(tuple[int, int], pair) for pair in pairs))
        product = WholeConvolution(weight, *self.input_quantizer.step_bounds, windows)
        return _Whole(product, step_of_sums(self))

    @property
    def _is_plain(self) -> bool:
        zeros_around = self.padding_mode == "zeros" and isinstance(self.padding, tuple)
        return self.groups == 1 and zeros_around


QuantizedLayer = QuantizedLinear | QuantizedConv2d


def computes_whole(x: Tensor, *quantizers: Quantizer) -> bool:
    """Whether products of what these give are computed on whole numbers.

    So they are wherever nothing is learned: without gradients, in full precision, with all of them
    on their grids. What is computed then is what a device computes, see `quantization.whole`.
    """
    # Autocast last: torch knows none for the meta device, where costs are counted, unquantized.
    return (
        not torch.is_grad_enabled()
        and all(quantizer.is_whole for quantizer in quantizers)
        and not torch.is_autocast_enabled(x.device.type)
    )


def step_of_sums(layer: QuantizedLayer) -> Tensor:
    """What a layer's sum of 1 is worth: input scale * weight scale, [channels] or []."""
    return layer.input_quantizer.step * layer.weight_quantizer.step


def _sources(layer: QuantizedLayer) -> tuple[Tensor, ...]:
    """What a forward on whole numbers depends on but for its input."""
    return (layer.weight, *layer.weight_quantizer.tensors, *layer.input_quantizer.tensors)


def quantized_layers(module: nn.Module) -> list[tuple[str, QuantizedLayer]]:
    """Every quantized layer below `module` with its path, in registration order."""
    return [
        (name, layer)
        for name, layer in module.named_modules()
        if isinstance(layer, QuantizedLinear | QuantizedConv2d)
    ]


def weight_quantizers(module: nn.Module) -> list[Quantizer]:
    """The quantizers of weights below `module`."""
    return [layer.weight_quantizer for _, layer in quantized_layers(module)]


@torch.no_grad()
def observe_weights(module: nn.Module, progress: Progress = silent) -> None:
    """Set the grid of every weight from the weight itself."""
    for _, layer in progress(quantized_layers(module), "observing weights"):
        with quantizer_mode(layer.weight_quantizer, Mode.OBSERVE):
            layer.weight_quantizer(layer.weight)


@torch.no_grad()
def put_weights_on_grid(module: nn.Module) -> None:
    """Replace every weight by its quantized value, so that the file holds what is computed."""
    for _, layer in quantized_layers(module):
        layer.weight.copy_(layer.weight_quantizer(layer.weight))
