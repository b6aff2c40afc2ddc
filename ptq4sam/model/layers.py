"""Linear and convolution layers whose weight and input pass through quantizers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptq4sam.progress import Progress, silent
from ptq4sam.quantization.modes import quantizer_mode
from ptq4sam.quantization.quantizers import Mode, Quantizer
from ptq4sam.quantization.whole import rescaled, whole_convolution, whole_linear


class QuantizedLinear(nn.Linear):
    """A linear layer on quantized input and weight; parameter names stay those of nn.Linear."""

    def __init__(
        self, source: nn.Linear, weight_quantizer: Quantizer, input_quantizer: Quantizer
    ) -> None:
        super().__init__(source.in_features, source.out_features, device="meta")
        self.weight, self.bias = source.weight, source.bias
        self.weight_quantizer = weight_quantizer
        self.input_quantizer = input_quantizer

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features]."""
        if computes_whole(x, self.weight_quantizer, self.input_quantizer):
            steps, weight = _operands(self, x)
            sums = whole_linear(steps, weight, self.input_quantizer.grid.largest_step)
            return rescaled(sums, step_of_sums(self), self.bias)
        weight = self.weight_quantizer(self.weight)
        return nn.functional.linear(self.input_quantizer(x), weight, self.bias)


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

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, in_channels, height, width] to [batch, out_channels, height', width']."""
        if computes_whole(x, self.weight_quantizer, self.input_quantizer) and self._is_plain:
            steps, weight = _operands(self, x)
            largest = self.input_quantizer.grid.largest_step
            sums = whole_convolution(self._convolve, steps, weight, largest)
            bias = None if self.bias is None else self.bias[:, None, None]
            scaled = sums * step_of_sums(self).reshape(-1, 1, 1)
            return scaled if bias is None else scaled + bias
        weight = self.weight_quantizer(self.weight)
        convolved: Tensor = self._conv_forward(self.input_quantizer(x), weight, self.bias)
        return convolved

    def _convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        convolved: Tensor = self._conv_forward(x, weight, None)
        return convolved

    @property
    def _is_plain(self) -> bool:
        return self.groups == 1 and self.padding_mode == "zeros"


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


def _operands(layer: QuantizedLayer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Input and weight in steps."""
    weight: Tensor = layer.weight_quantizer(layer.weight, steps=True)
    steps: Tensor = layer.input_quantizer(x, steps=True)
    return steps, weight


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
