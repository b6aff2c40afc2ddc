"""Better conditioned weights (ACNR of AHCQ-SAM, Zhang et al., 2026).

A layer whose weight has a few large singular values and many small ones amplifies what its inputs
err by. Of W^T = U diag(s) V^T, whose condition s_max / s_min is 100 or more, the singular values
behind the first ones that make up 80 % of the sum of squares are raised towards their mean t,

    s_i <- max(s_i, (s_i + 2 l t) / (1 + 2 l + 2 b c_i)),   c_i = E[(d U)_i^2],

less where the inputs' error d is large; 200 times. Published code decomposes the weight anew each
time. U and V stay what they are, so that one decomposition and a loop over singular values gives
the same.

It changes what the layer computes, also where its inputs are exact. Here that is part of the weight
that is quantized and not of the float model, which reconstruction learns from. Inputs are the float
model's and their quantized values, where published code takes those of the quantized network.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq4sam.methods.aqer import layer_groups, set_correction
from ptq4sam.methods.method import METHODS, Calibration, Method
from ptq4sam.operators.base import QuantizedLayer
from ptq4sam.quantization.modes import quantizer_mode
from ptq4sam.quantization.quantizers import Mode
from ptq4sam.records import Record


@dataclass(frozen=True)
class Acnr(Record):
    """Settings, as published.

    Attributes:
        towards_mean: l.
        against_error: b.
        times: how often.
        energy: share of the sum of squares whose singular values stay.
        condition: below which a weight stays.
    """

    towards_mean: float = 0.003
    against_error: float = 0.001
    times: int = 200
    energy: float = 0.8
    condition: float = 100.0

    def _validate(self) -> None:
        self._require(self.towards_mean > 0, "towards_mean", "more than 0")
        self._require(self.against_error >= 0, "against_error", "0 or more")
        self._require(self.times >= 1, "times", "1 or more")
        self._require(0 < self.energy < 1, "energy", "between 0 and 1")
        self._require(self.condition >= 1, "condition", "1 or more")


@dataclass
class InputErrors:
    """Sum of d^T d over a layer's inputs.

    Attributes:
        squares: [in, in], float64.
        count: how many inputs.
    """

    squares: Tensor
    count: int = 0

    @classmethod
    def of(cls, layer: QuantizedLayer) -> InputErrors:
        """Nothing yet."""
        size = layer.weight.shape[1]
        return cls(torch.zeros(size, size, dtype=torch.float64, device=layer.weight.device))

    def add(self, layer: QuantizedLayer, inputs: tuple[Tensor, ...]) -> None:
        """Take the inputs of a call into account: a hook."""
        x = inputs[0].reshape(-1, layer.weight.shape[1])
        error = layer.input_quantizer.quantize(x) - x
        self.squares += (error.t() @ error).double()
        self.count += len(x)


def raised(values: Tensor, errors: Tensor, settings: Acnr) -> Tensor:
    """Singular values with small ones raised.

    Args:
        values: [n] positive, float64.
        errors: [n] c_i of each.
        settings: of the method.
    """
    towards, against = 2 * settings.towards_mean, 2 * settings.against_error
    for _ in range(settings.times):
        ordered, places = values.sort(descending=True)
        squares = ordered.square().cumsum(0)
        # The one that completes the share is the last to stay.
        tail = places[int((squares < settings.energy * squares[-1]).sum()) + 1 :]
        new = (values + towards * values.mean()) / (1 + towards + against * errors)
        values = values.clone()
        values[tail] = torch.maximum(values, new)[tail]
    return values


def conditioned(weight: Tensor, errors: InputErrors, settings: Acnr) -> Tensor | None:
    """A weight [out, in] with raised singular values, float64; None for one that stays."""
    left, values, right = torch.linalg.svd(weight.double().t(), full_matrices=False)
    if float(values[0]) < settings.condition * float(values[-1]):
        return None
    along = (left * (errors.squares @ left)).sum(0) / errors.count
    found: Tensor = ((left * raised(values, along, settings)) @ right).t()
    return found


@METHODS.register("acnr")
class AcnrMethod(Method[Acnr]):
    """Of linear layers."""

    settings_type = Acnr

    def after_ranges(self, calibration: Calibration) -> Sequence[str]:
        """Change weights as they are quantized, and set their ranges anew."""
        changed = []
        for group in layer_groups(calibration.sam, matrices=1):
            errors = {name: InputErrors.of(layer) for name, layer in group}
            with quantizer_mode(calibration.sam, Mode.FLOAT), ExitStack() as hooks:
                for name, layer in group:
                    hooks.callback(layer.register_forward_pre_hook(errors[name].add).remove)
                for item in calibration.items:
                    calibration.run(item)
            for name, layer in group:
                if errors[name].count and self._change(layer, errors[name]):
                    changed.append(name)
        return changed

    def _change(self, layer: QuantizedLayer, errors: InputErrors) -> bool:
        weight = layer.weight_quantizer.corrected(layer.weight)
        found = conditioned(weight, errors, self.settings)
        if found is None:
            return False
        set_correction(layer, (found - layer.weight).to(layer.weight.dtype))
        return True
