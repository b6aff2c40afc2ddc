"""A factor for each channel between a depthwise and a projecting convolution.

Behind a depthwise convolution channels are of very different size, and one even grid for all of
them gives most of them few codes. A GELU lies before the grid, so that no scale can be folded into
the depthwise convolution itself; but behind the GELU channel c can be multiplied by f_c, and the
column of the projecting weight that reads it divided. On a device the product is the scale, channel
by channel, by which the result of the GELU becomes codes; sums of codes stay as they are (Nagel et
al., "Data-Free Quantization", 2019, section 4.1, has it for ReLUs, across which it commutes).

f_c is the power of two next to (r / r_c)^a, r_c being the largest size of channel c and r the
geometric mean: products with powers of two round nothing, so that the float model stays what it is,
bit for bit. a is what leaves the least error of the projecting convolution with both quantized, 0
among the choices.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ptq4sam.methods.method import METHODS, Calibration, Method
from ptq4sam.methods.norm_scales import Seen
from ptq4sam.operators.base import QuantizedLayer, observe_weights
from ptq4sam.quantization.modes import quantizer_mode, quantizers
from ptq4sam.quantization.quantizers import Mode
from ptq4sam.records import Record

_ROWS = 2048
"""Of a layer's inputs that errors are measured on."""
_LARGEST_EXPONENT = 12.0
"""Of a factor: half precision holds it."""


@dataclass(frozen=True)
class ChannelScales(Record):
    """Settings.

    Attributes:
        strengths: what a is chosen from, beside 0.
    """

    strengths: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)

    def _validate(self) -> None:
        good = len(self.strengths) > 0 and all(0 < a <= 1 for a in self.strengths)
        self._require(good, "strengths", "some above 0, up to 1")


def factors_of(seen: Seen, strength: float) -> Tensor:
    """Factors of all channels [channels], powers of two."""
    exponents = -seen.scales(strength).log2().round()
    return exponents.clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT).exp2()


def output_error(layer: QuantizedLayer, seen: Seen, factors: Tensor) -> float:
    """Mean squared error of a quantized 1x1 convolution's output with factors.

    Args:
        layer: not calibrated; it is not touched.
        seen: its inputs.
        factors: [channels].
    """
    tried = copy.deepcopy(layer)
    tried.weight.div_(factors[:, None, None])
    for _, quantizer in quantizers(tried):
        quantizer.mode = Mode.QUANTIZE
    observe_weights(tried)
    with quantizer_mode(tried.input_quantizer, Mode.OBSERVE):
        for rows, ends in zip(seen.rows, seen.ends, strict=True):
            tried.input_quantizer(torch.cat([rows, ends]) * factors)
    total, count = 0.0, 0
    for rows in seen.rows:
        exact = nn.functional.linear(rows, layer.weight.flatten(1), layer.bias)
        found = tried((rows * factors)[:, :, None, None])[:, :, 0, 0]
        total += float((found - exact).square().sum(dtype=torch.float64))
        count += exact.numel()
    return total / count


@METHODS.register("channel-scales")
class ChannelScalesMethod(Method[ChannelScales]):
    """Of the activations that the model's description names."""

    settings_type = ChannelScales

    def before_ranges(self, calibration: Calibration) -> Sequence[str]:
        """Set factors; the float output stays as it is."""
        activations = calibration.sam.scaled_layers()
        layers = {name: calibration.sam.get_submodule(name) for name in activations}
        layers = {n: layer for n, layer in layers.items() if isinstance(layer, QuantizedLayer)}
        few = -(-_ROWS // len(calibration.items))
        seen = {name: Seen(few) for name in layers}

        def look(layer: nn.Module, inputs: tuple[Tensor, ...], name: str) -> None:
            seen[name].add(layer, (inputs[0].movedim(1, -1),))

        with ExitStack() as hooks:
            for name, layer in layers.items():
                handle = layer.register_forward_pre_hook(partial(look, name=name))
                hooks.callback(handle.remove)
            for item in calibration.items:
                calibration.run(item)
        changed = []
        for name, layer in layers.items():
            tried = [factors_of(seen[name], a) for a in self.settings.strengths]
            every = [torch.ones_like(tried[0]), *tried]
            errors = [output_error(layer, seen[name], factors) for factors in every]
            best = every[errors.index(min(errors))]
            if bool((best != 1).any()):
                activations[name].factors.copy_(best[:, None, None])
                layer.weight.div_(best[:, None, None])
                changed.append(name)
        return changed
