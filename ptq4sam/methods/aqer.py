"""Weights that make up for the error of their quantized inputs (Aqer of ERQ, Zhong et al., 2024).

Of a layer W with inputs x, which are quantized to x' = x + d, the sum W x is wanted and (W + c) x'
is computed. The correction of least squared error, ridge regression, is

    c = -W E[d x'^T] (E[x' x'^T] + r I)^-1.

It is added to a weight when that is quantized, not to the float model, so that reconstruction still
learns what the float model gives. W is the weight with what methods before this one added to it,
which stays. Inputs are the float model's, so that all layers are corrected by
as few passes over the pictures as memory allows.

A layer with few different inputs, as tokens of masks and of corners of boxes are, has corrections
that fit these alone: so whether one is of use is seen on other pictures than it was made of.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from ptq4sam.methods.method import METHODS, Calibration, Method
from ptq4sam.operators.base import QuantizedLayer, quantized_layers
from ptq4sam.quantization.affine import FixedQuantizer
from ptq4sam.quantization.modes import quantizer_mode
from ptq4sam.quantization.quantizers import Mode
from ptq4sam.records import Record

_log = logging.getLogger(__name__)

_BYTES = 2**29
"""Of products of inputs that are held at once."""


@dataclass(frozen=True)
class Aqer(Record):
    """Settings.

    Attributes:
        ridge: what is added to the diagonal, as a share of its mean. Published: a number that does
            not depend on the inputs' size.
    """

    ridge: float = 0.01

    def _validate(self) -> None:
        self._require(self.ridge > 0, "ridge", "more than 0")


@dataclass
class InputProducts:
    """Sums over a layer's inputs.

    Attributes:
        quantized: [in, in] sum of x' x'^T.
        difference: [in, in] sum of d x'^T.
        count: how many inputs.
    """

    quantized: Tensor
    difference: Tensor
    count: int = 0

    @classmethod
    def of(cls, layer: QuantizedLayer) -> InputProducts:
        """Nothing yet."""
        size = (2, layer.weight.shape[1], layer.weight.shape[1])
        return cls(*torch.zeros(size, dtype=torch.float64, device=layer.weight.device))

    def with_those(self, others: InputProducts) -> InputProducts:
        """Of both inputs together."""
        return InputProducts(
            self.quantized + others.quantized,
            self.difference + others.difference,
            self.count + others.count,
        )

    def add(self, layer: QuantizedLayer, inputs: tuple[Tensor, ...]) -> None:
        """Take the inputs of a call into account."""
        x = inputs[0].reshape(-1, layer.weight.shape[1])
        moved = layer.input_quantizer.quantize(x)
        self.quantized += (moved.t() @ moved).double()
        self.difference += ((moved - x).t() @ moved).double()
        self.count += len(x)


def correction(weight: Tensor, products: InputProducts, ridge: float) -> Tensor:
    """What is added to a weight [out, in], float64.

    Args:
        weight: the layer's.
        products: over its inputs.
        ridge: share of the mean of the diagonal.
    """
    gram = products.quantized.clone()
    gram.diagonal().add_(ridge * gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny))
    # X gram = -W D, solved from the left since gram is symmetric.
    found: Tensor = torch.linalg.solve(gram, -(weight.double() @ products.difference).t()).t()
    return found


def error(used: Tensor, weight: Tensor, products: InputProducts) -> float:
    """Mean squared error of sums with a weight in the place of another, but for a constant."""
    used, weight = used.double(), weight.double()
    # E[x' x^T] = E[x' x'^T] - E[x' d^T].
    cross = products.quantized - products.difference.t()
    squares = (used @ products.quantized * used).sum() - 2 * (used @ cross * weight).sum()
    return float(squares) / products.count


def set_correction(layer: QuantizedLayer, correction: Tensor) -> dict[str, Tensor]:
    """Give a weight a correction, and its quantizer the range of both together.

    Returns:
        The state of the weight's quantizer before.
    """
    quantizer = cast(FixedQuantizer, layer.weight_quantizer)
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer.correct(layer.weight, correction)
    return before


@METHODS.register("aqer")
class AqerMethod(Method[Aqer]):
    """Of linear layers; one whose rounded weight is worse with its correction goes without."""

    settings_type = Aqer

    def after_ranges(self, calibration: Calibration) -> Sequence[str]:
        """Correct weights and set their ranges anew."""
        changed = []
        for group in layer_groups(calibration.sam):
            halves = [_seen(calibration, group, half) for half in range(2)]
            for name, layer in group:
                if halves[0][name].count and self._correct(name, layer, *(h[name] for h in halves)):
                    changed.append(name)
        return changed

    def _correct(
        self, name: str, layer: QuantizedLayer, made: InputProducts, other: InputProducts
    ) -> bool:
        """Correct a layer by all inputs, if a correction by some is of use to others."""
        quantizer, weight = layer.weight_quantizer, layer.weight
        others = other if other.count else made
        wanted = quantizer.corrected(weight)

        def correct(products: InputProducts) -> dict[str, Tensor]:
            found = correction(wanted, products, self.settings.ridge).to(weight.dtype)
            return set_correction(layer, wanted - weight + found)

        without = error(quantizer(weight), wanted, others)
        before = correct(made)
        rise = error(quantizer(weight), wanted, others) - without
        if rise < 0:
            correct(made.with_those(other))
            return True
        quantizer.load_state_dict(before)
        _log.info(
            "aqer leaves %s as it is: its squared error would rise by %.4g on other pictures",
            *(name, rise),
        )
        return False


def _seen(
    calibration: Calibration, group: list[tuple[str, QuantizedLayer]], half: int
) -> dict[str, InputProducts]:
    """Inputs of layers on every second picture."""
    products = {name: InputProducts.of(layer) for name, layer in group}
    with quantizer_mode(calibration.sam, Mode.FLOAT), ExitStack() as hooks:
        for name, layer in group:
            see = partial(_see, products[name])
            hooks.callback(layer.register_forward_pre_hook(see).remove)
        for item in calibration.items[half::2]:
            calibration.run(item)
    return products


def _see(products: InputProducts, layer: QuantizedLayer, inputs: tuple[Tensor, ...]) -> None:
    products.add(layer, inputs)


def layer_groups(sam: nn.Module, matrices: int = 4) -> Iterator[list[tuple[str, QuantizedLayer]]]:
    """Linear layers whose weights can have corrections, as many at once as memory holds.

    Args:
        sam: the model.
        matrices: [in, in] in float64, that each needs.
    """
    group: list[tuple[str, QuantizedLayer]] = []
    held = 0
    for name, layer in quantized_layers(sam):
        if not layer.weight_quantizer.can_be_corrected or layer.weight.dim() != 2:
            continue
        needed = matrices * 8 * layer.weight.shape[1] ** 2
        if group and held + needed > _BYTES:
            yield group
            group, held = [], 0
        group.append((name, layer))
        held += needed
    if group:
        yield group
