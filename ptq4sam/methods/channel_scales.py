"""A factor for each channel between an activation and the 1x1 convolution that alone reads it.

Behind a depthwise convolution, and behind the wide one of a fused block, channels are of very
different size, and one even grid for all of them gives most of them few codes. A GELU lies before
the grid, so that no scale can be folded into that convolution itself; but behind the GELU channel c
can be multiplied by f_c, and the column of the projecting weight that reads it divided. On a device
the product is the scale, channel by channel, by which the result of the GELU becomes codes; sums of
codes stay as they are (Nagel et al., "Data-Free Quantization", 2019, section 4.1, has it for ReLUs,
across which it commutes).

f_c is the power of two next to (r / r_c)^a, r_c being the largest size of channel c and r the
geometric mean: products with powers of two round nothing, so that the float model stays what it is,
bit for bit. a is what leaves the least error of the projecting convolution with both quantized, 0
among the choices.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ptq4sam.methods.channel_sizes import Seen, Strengths, inputs_seen
from ptq4sam.methods.method import METHODS, Calibration, Method
from ptq4sam.operators.base import QuantizedLayer, as_layer, observe_weights
from ptq4sam.quantization.modes import quantizer_mode, quantizers
from ptq4sam.quantization.quantizers import Mode

_LARGEST_EXPONENT = 12.0
"""Of a factor: half precision holds it."""


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
class ChannelScalesMethod(Method[Strengths]):
    """Of the activations that the model's description names."""

    settings_type = Strengths

    def before_ranges(self, calibration: Calibration) -> Sequence[str]:
        """Set factors; the float output stays as it is."""
        activations = calibration.sam.scaled_layers()
        found = {name: as_layer(calibration.sam.get_submodule(name)) for name in activations}
        layers = {name: layer for name, layer in found.items() if layer is not None}
        changed = []
        for name, seen in inputs_seen(calibration, layers, axis=1).items():
            error = partial(output_error, layers[name], seen)
            factors = self.settings.best(partial(factors_of, seen), error)
            if factors is not None:
                activations[name].factors.copy_(factors[:, None, None])
                layers[name].weight.div_(factors[:, None, None])
                changed.append(name)
        return changed
