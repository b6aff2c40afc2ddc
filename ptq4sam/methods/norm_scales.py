"""A scale for each channel of a layer's input, folded into the norm before it.

A norm's outputs have channels of very different size, and one even grid for all of them. Dividing a
norm's weight and bias by s_c channel by channel, and multiplying the columns of the layer behind by
s_c, leaves the float output as it is (RepQ-ViT, Li et al., 2023; SmoothQuant, Xiao et al., 2023),
to the rounding of floats. It is a scale without a shift: SAM's windows are padded with zeros behind
the norm, and what is padded attends.

With r_c the largest size of channel c,

    s_c = (r_c / r)^a,

r being the geometric mean: a = 1 gives all channels one size and all of the difference to the
weight, whose grid may suffer. So a is what leaves the least error of the layer's output with both
quantized, 0 among the choices. A layer is left alone where another reads the norm's output too.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ptq4sam.methods.channel_sizes import Seen, Strengths, inputs_seen
from ptq4sam.methods.method import METHODS, Calibration, Method
from ptq4sam.operators.base import QuantizedLayer, observe_weights
from ptq4sam.quantization.modes import quantizer_mode, quantizers
from ptq4sam.quantization.quantizers import Mode


def output_error(layer: QuantizedLayer, seen: Seen, scales: Tensor) -> float:
    """Mean squared error of a quantized layer's output with scaled inputs and weight.

    Args:
        layer: not calibrated; it is not touched.
        seen: its inputs.
        scales: [in].
    """
    tried = copy.deepcopy(layer)
    tried.weight.mul_(scales)
    for _, quantizer in quantizers(tried):
        quantizer.mode = Mode.QUANTIZE
    observe_weights(tried)
    with quantizer_mode(tried.input_quantizer, Mode.OBSERVE):
        for rows, ends in zip(seen.rows, seen.ends, strict=True):
            tried.input_quantizer(torch.cat([rows, ends]) / scales, tried.weight.t())
    errors = [
        (tried(rows / scales) - nn.functional.linear(rows, layer.weight, layer.bias)).square()
        for rows in seen.rows
    ]
    return float(torch.cat(errors).mean(dtype=torch.float64))


def fold(norm: nn.Module, layer: nn.Module, scales: Tensor) -> None:
    """Divide what a norm gives by scales [in], and multiply what a layer makes of it."""
    norm.get_parameter("weight").div_(scales)
    norm.get_parameter("bias").div_(scales)
    layer.get_parameter("weight").mul_(scales)


def folded_scales(norm: nn.Module, source: nn.Module) -> Tensor:
    """By what a norm's output was divided, [channels], against the norm that it was made of."""
    scales = torch.ones_like(norm.get_parameter("weight"))
    for name in ("bias", "weight"):
        now, before = norm.get_parameter(name), source.get_parameter(name)
        scales = torch.where(now != 0, before / now, scales)
    return scales


@METHODS.register("norm-scales")
class NormScalesMethod(Method[Strengths]):
    """Of linear layers that alone read what a norm gives, as the model's description says."""

    settings_type = Strengths

    def before_ranges(self, calibration: Calibration) -> Sequence[str]:
        """Fold scales; the float output stays as it is."""
        norms: dict[str, str] = calibration.sam.normalized_layers()
        layers = {name: calibration.sam.get_submodule(name) for name in norms}
        changed = []
        for name, seen in inputs_seen(calibration, layers).items():
            error = partial(output_error, layers[name], seen)
            scales = self.settings.best(seen.scales, error)
            if scales is not None:
                fold(calibration.sam.get_submodule(norms[name]), layers[name], scales)
                changed.append(name)
        return changed
