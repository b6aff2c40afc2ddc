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
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ptq4sam.methods.method import METHODS, Calibration, Method
from ptq4sam.operators.base import QuantizedLayer, observe_weights
from ptq4sam.quantization.modes import quantizer_mode, quantizers
from ptq4sam.quantization.quantizers import Mode
from ptq4sam.records import Record

_ROWS = 2048
"""Of a layer's inputs that errors are measured on."""


@dataclass(frozen=True)
class NormScales(Record):
    """Settings.

    Attributes:
        strengths: what a is chosen from, beside 0.
    """

    strengths: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)

    def _validate(self) -> None:
        good = len(self.strengths) > 0 and all(0 < a <= 1 for a in self.strengths)
        self._require(good, "strengths", "some above 0, up to 1")


@dataclass
class Seen:
    """Inputs of a layer.

    Attributes:
        few: rows that are kept of a picture.
        rows: [few, in] of each picture.
        ends: [2, in] smallest and largest number of each channel, of each picture.
    """

    few: int
    rows: list[Tensor] = field(default_factory=list)
    ends: list[Tensor] = field(default_factory=list)

    def add(self, _layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Take the input of a call into account: a hook."""
        x = inputs[0].flatten(0, -2)
        self.rows.append(x[:: -(-len(x) // self.few)].clone())
        self.ends.append(torch.stack(torch.aminmax(x, dim=0)))

    def scales(self, strength: float) -> Tensor:
        """Scales of all channels [in]; channels that are always 0 keep theirs."""
        sizes = torch.stack(self.ends).abs().amax((0, 1)).double()
        used = sizes > 0
        logs = torch.where(used, sizes.clamp(min=1e-30).log(), 0.0)
        middle = logs.sum() / used.sum().clamp(min=1)
        scales = torch.where(used, ((logs - middle) * strength).exp(), 1.0)
        return scales.to(self.rows[0].dtype)


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
class NormScalesMethod(Method[NormScales]):
    """Of linear layers that alone read what a norm gives, as the model's description says."""

    settings_type = NormScales

    def before_ranges(self, calibration: Calibration) -> Sequence[str]:
        """Fold scales; the float output stays as it is."""
        norms: dict[str, str] = calibration.sam.normalized_layers()
        layers = {name: calibration.sam.get_submodule(name) for name in norms}
        few = -(-_ROWS // len(calibration.items))
        seen = {name: Seen(few) for name in norms}
        with ExitStack() as hooks:
            for name, layer in layers.items():
                hooks.callback(layer.register_forward_pre_hook(seen[name].add).remove)
            for item in calibration.items:
                calibration.run(item)
        changed = []
        for name, layer in layers.items():
            scales = self._best(layer, seen[name])
            if scales is not None:
                fold(calibration.sam.get_submodule(norms[name]), layer, scales)
                changed.append(name)
        return changed

    def _best(self, layer: QuantizedLayer, seen: Seen) -> Tensor | None:
        """The scales of the least error; None where it is that of none."""
        best, least = None, output_error(layer, seen, seen.scales(0.0))
        for strength in self.settings.strengths:
            scales = seen.scales(strength)
            error = output_error(layer, seen, scales)
            if error < least:
                best, least = scales, error
        return best
