"""Weights that make up for what quantization does to attentions (MAC of CAR-SAM, CVPR 2026).

A decoder attention wants the logits Q K^T of its float query Q and key K, and has those of
quantized operands. With the inputs X of the query's projection, W its weight, K' the quantized keys
and R the error of the logits, the change d of W that leaves least of it,

    min |R - X d K'^T|^2 + r |d|^2,   that is   X^T X d K'^T K' + r d = X^T R K',

has a closed form by the eigenvectors of both Gram matrices, head by head:

    X^T X = U L U^T,  K'^T K' = V S V^T,  d = U [(U^T X^T R K' V)_ij / (L_i S_j + r)] V^T.

What all logits of a query have in common a softmax does not see: K and K' are without their means
over keys, and so are the inputs of the key's projection. Published equations have it in R, where it
is most of the error wherever keys are few and far from zero, as tokens are.

The same holds for the key's projection, with the parts of query and key exchanged. What the value's
projection must make up for is the error of the attention A' that weighs values: ridge regression
with A' X in the place of X. Query, key and value are corrected one after the other, each with what
was corrected before it.

Published, R is the error of the other operand alone. Here X is quantized as well, so that R has all
that is in the logits but for the rounding of the weight itself. Over several prompts the right side
is their mean; L and S are those of the mean Gram matrices.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from ptq4sam.methods.aqer import set_correction
from ptq4sam.methods.method import METHODS, Calibration, Method
from ptq4sam.methods.pcc import AttentionParts
from ptq4sam.operators.base import KEY, QUERY, SOFTMAX, VALUE, QuantizedLayer
from ptq4sam.quantization.modes import quantizer_mode
from ptq4sam.quantization.quantizers import Mode
from ptq4sam.records import Record

_log = logging.getLogger(__name__)

ROLES = (QUERY, KEY, VALUE)
"""In the order of correction."""


@dataclass(frozen=True)
class Mac(Record):
    """Settings.

    Attributes:
        ridge: r, as a share of the mean of all L_i S_j.
    """

    ridge: float = 0.01

    def _validate(self) -> None:
        self._require(self.ridge > 0, "ridge", "more than 0")


@dataclass
class Sums:
    """Over prompts, float64: what the correction of one projection needs.

    Attributes:
        inputs: [heads or 1, in, in] sum of X^T X.
        others: [heads, d, d] sum of the Gram matrices of what is multiplied with; of a value's
            projection the unit matrix.
        right: [heads, in, d] sum of X^T R K'.
        count: prompts.
    """

    inputs: Tensor
    others: Tensor
    right: Tensor
    count: int = 0

    def add(self, inputs: Tensor, others: Tensor, right: Tensor) -> None:
        """Take prompts into account: as the attributes, with an axis of prompts in front."""
        self.inputs = self.inputs + inputs.sum(0, dtype=torch.float64)
        self.others = self.others + others.sum(0, dtype=torch.float64)
        self.right = self.right + right.sum(0, dtype=torch.float64)
        self.count += len(right)

    def solution(self, ridge: float) -> Tensor:
        """The correction [heads, in, d]; directions that inputs do not have are left alone."""
        lengths, across = torch.linalg.eigh(self.inputs / self.count)
        others, along = torch.linalg.eigh(self.others / self.count)
        products = (lengths[:, :, None] * others[:, None, :]).clamp(min=0)
        added = ridge * products.mean((1, 2), keepdim=True)
        added = added.clamp(min=torch.finfo(products.dtype).tiny)
        turned = across.mT @ (self.right / self.count) @ along
        found: Tensor = across @ (turned / (products + added)) @ along.mT
        return found


class Call:
    """A call of an attention, in the float model and as its quantizers are now.

    Args:
        parts: the attention.
        exact: float query, key and value, [prompts, heads, tokens, d].
        inputs: of their projections, [prompts, tokens, in].
    """

    def __init__(
        self, parts: AttentionParts, exact: dict[str, Tensor], inputs: dict[str, Tensor]
    ) -> None:
        self.parts, self.exact, self._inputs = parts, exact, inputs

    def moved_input(self, role: str) -> Tensor:
        """Quantized input of a projection."""
        return layer_of(self.parts, role).input_quantizer.quantize(self._inputs[role])

    def projected(self, role: str) -> Tensor:
        """What a projection gives to quantized inputs, with its weight before rounding."""
        layer = layer_of(self.parts, role)
        return self._heads(role, corrected_weight(layer))

    def quantized(self, role: str) -> Tensor:
        """Quantized query, key or value, by the rounded weight."""
        layer = layer_of(self.parts, role)
        weight = layer.weight_quantizer.quantize(corrected_weight(layer))
        return self.parts.core.quantizer(role).quantize(self._heads(role, weight))

    def attention(self) -> Tensor:
        """Quantized softmax outputs [prompts, heads, n, m]."""
        logits = self.quantized(QUERY) @ self.quantized(KEY).mT * self._scale
        return self.parts.core.quantizer(SOFTMAX).quantize(logits.softmax(-1))

    def exact_attention(self) -> Tensor:
        """Float softmax outputs [prompts, heads, n, m]."""
        return (self.exact[QUERY] @ self.exact[KEY].mT * self._scale).softmax(-1)

    def error(self, role: str) -> float:
        """Squared error of what a role's projection is corrected for, summed."""
        if role == VALUE:
            wanted = self.exact_attention() @ self.exact[VALUE]
            found = self.attention() @ self.quantized(VALUE)
        else:
            wanted = self.exact[QUERY] @ _without_mean(self.exact[KEY]).mT
            found = self.quantized(QUERY) @ _without_mean(self.quantized(KEY)).mT
        return float((found - wanted).square().sum(dtype=torch.float64))

    @property
    def _scale(self) -> float:
        return cast(float, self.parts.core.scale)

    def _heads(self, role: str, weight: Tensor) -> Tensor:
        layer, x = layer_of(self.parts, role), self.moved_input(role)
        output = nn.functional.linear(x, weight, layer.bias)
        prompts, tokens, _ = output.shape
        return output.reshape(prompts, tokens, self.exact[role].shape[1], -1).transpose(1, 2)


def add_call(sums: Sums, call: Call, role: str) -> None:
    """Take a call into account for the correction of one projection."""
    if role == VALUE:
        _add_values(sums, call)
        return
    other = KEY if role == QUERY else QUERY
    x, multiplied, exact = call.moved_input(role), call.quantized(other), call.exact[other]
    if role == QUERY:
        multiplied, exact = _without_mean(multiplied), _without_mean(exact)
    else:
        x = _without_mean(x)
    gram = multiplied.mT @ multiplied
    # R K' without the logits: Q K^T K' - Q' K'^T K'. Of keys, X^T takes the mean away.
    error = call.exact[role] @ (exact.mT @ multiplied) - call.projected(role) @ gram
    sums.add((x.mT @ x)[:, None], gram, x.mT[:, None] @ error)


def _without_mean(x: Tensor) -> Tensor:
    """Keys, or what gives them, less their mean over keys."""
    return x - x.mean(-2, keepdim=True)


def _add_values(sums: Sums, call: Call) -> None:
    attention = call.attention()
    error = call.exact_attention() @ call.exact[VALUE] - attention @ call.projected(VALUE)
    for x, weighs, rest in zip(call.moved_input(VALUE), attention, error, strict=True):
        queries, keys = weighs.shape[-2:]
        if keys < queries:
            # Of an image that looks at tokens, the product with inputs would be large.
            squares, right = x.mT @ (weighs.mT @ weighs) @ x, x.mT @ (weighs.mT @ rest)
        else:
            seen = weighs @ x
            squares, right = seen.mT @ seen, seen.mT @ rest
        unit = torch.eye(rest.shape[-1], device=x.device).expand(len(rest), -1, -1)
        sums.add(squares[None], unit[None], right[None])


def layer_of(parts: AttentionParts, role: str) -> QuantizedLayer:
    """The projection of a role."""
    return {QUERY: parts.query, KEY: parts.key, VALUE: parts.value}[role]


def corrected_weight(layer: QuantizedLayer) -> Tensor:
    """A layer's weight with its correction, before it is rounded."""
    return layer.weight_quantizer.corrected(layer.weight)


@METHODS.register("mac")
class MacMethod(Method[Mac]):
    """Of the mask decoder's projections; one whose error rises goes without."""

    settings_type = Mac

    def after_ranges(self, calibration: Calibration) -> Sequence[str]:
        """Correct weights and set their ranges anew."""
        parts: dict[str, AttentionParts] = calibration.sam.attention_parts()
        changed = []
        for role in ROLES:
            layers = {name: layer_of(found, role) for name, found in parts.items()}
            layers = {
                name: layer
                for name, layer in layers.items()
                if layer.weight_quantizer.can_be_corrected
            }
            changed += self._correct(calibration, {name: parts[name] for name in layers}, role)
        return changed

    def _correct(
        self, calibration: Calibration, parts: dict[str, AttentionParts], role: str
    ) -> list[str]:
        nothing = torch.zeros((), dtype=torch.float64, device=calibration.sam.device)
        sums = {name: Sums(nothing, nothing, nothing) for name in parts}
        watch(calibration, parts, lambda name, call: add_call(sums[name], call, role))
        corrected = {}
        for name, attention in parts.items():
            if sums[name].count:
                layer = layer_of(attention, role)
                found = sums[name].solution(self.settings.ridge)
                weight = found.transpose(1, 2).flatten(0, 1).to(layer.weight.dtype)
                total = corrected_weight(layer) - layer.weight + weight
                corrected[name] = _Correction(layer, total)
        errors = {name: [0.0, 0.0] for name in corrected}

        def compare(name: str, call: Call) -> None:
            for place in range(2):
                errors[name][place] += call.error(role)
                corrected[name].exchange()

        watch(calibration, {name: parts[name] for name in corrected}, compare)
        changed = []
        for name, (after, before) in errors.items():
            path = f"{name}: {role}"
            if after < before:
                changed.append(path)
                continue
            corrected[name].exchange()
            _log.info("mac leaves %s as it is: error %.4g, %.4g before", path, after, before)
        return changed


class _Correction:
    """A layer's correction with the range of its weight, to be exchanged with what was before."""

    def __init__(self, layer: QuantizedLayer, correction: Tensor) -> None:
        self._quantizer = layer.weight_quantizer
        self._other = set_correction(layer, correction)

    def exchange(self) -> None:
        """Put back what the last exchange took out."""
        state = {name: value.clone() for name, value in self._quantizer.state_dict().items()}
        self._quantizer.load_state_dict(self._other)
        self._other = state


def watch(
    calibration: Calibration,
    parts: dict[str, AttentionParts],
    see: Callable[[str, Call], None],
) -> None:
    """Run the float model on all pictures and show each call of the attentions.

    Args:
        calibration: the model with its ranges.
        parts: attentions by name.
        see: takes the name and the call.
    """
    with quantizer_mode(calibration.sam, Mode.FLOAT), ExitStack() as hooks:
        for name, attention in parts.items():
            _watch(name, attention, see, hooks)
        for item in calibration.items:
            calibration.run(item)


def _watch(
    name: str, parts: AttentionParts, see: Callable[[str, Call], None], hooks: ExitStack
) -> None:
    exact: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}

    def keep_input(role: str, _layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        inputs[role] = given[0]

    def keep_exact(_core: nn.Module, given: tuple[Tensor, ...]) -> None:
        exact.update(zip(ROLES, given[:3], strict=True))

    def show(_owner: nn.Module, _inputs: object, _output: Tensor) -> None:
        see(name, Call(parts, dict(exact), dict(inputs)))

    for role in ROLES:
        handle = layer_of(parts, role).register_forward_pre_hook(partial(keep_input, role))
        hooks.callback(handle.remove)
    hooks.callback(parts.core.register_forward_pre_hook(keep_exact).remove)
    hooks.callback(parts.owner.register_forward_hook(show).remove)
