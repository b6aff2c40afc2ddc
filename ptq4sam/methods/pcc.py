"""Ranges of queries and keys by what an attention looks at (PCC of SAQ-SAM, AAAI 2026).

Whether a range is good is not told by how near its numbers are, but by whether the places that a
query attends to stay the same. A map's mask are the places above a share of the query's largest;
the loss of a range is 1 less the intersection over union of the masks with and without it, averaged
over prompts and heads. For the decoder's attentions in their order, and of each for the inputs of
both projections, the query and the key, some thirty symmetric percentiles are tried, twice, with
what was chosen before switched on. Heads with scales of their own have the percentiles of their own
numbers, the same for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ptq4sam.methods.method import METHODS, Calibration, Method
from ptq4sam.methods.task_gradients import squared_gradients
from ptq4sam.operators.base import INPUT, KEY, QUERY, QuantizedLayer, QuantizedOperator
from ptq4sam.quantization.affine import AffineQuantizer
from ptq4sam.quantization.modes import quantizer_mode
from ptq4sam.quantization.quantizers import Mode
from ptq4sam.records import Record

_PERCENTILES = (
    *(0.85, 0.87, 0.88, 0.89, 0.9, 0.91, 0.92, 0.93, 0.94, 0.95, 0.96, 0.965, 0.97, 0.975, 0.98),
    *(0.983, 0.985, 0.987, 0.989, 0.99, 0.993, 0.995, 0.997, 0.999, 0.9993, 0.9995, 0.9997),
    *(0.9999, 0.99999),
)
_MOST = 2**21
"""Numbers of a tensor that percentiles are taken of."""

QUERY_INPUT, KEY_INPUT = "query projection's input", "key projection's input"


@dataclass(frozen=True)
class Pcc(Record):
    """Settings.

    Attributes:
        share: of a query's largest attention, above which a place counts.
        passes: over all attentions.
        percentiles: that are tried.
        metric: "overlap" of the masks, as published, or "hessian": squared errors of the
            attention's output, weighed by what they do to masks (`task_gradients`).
    """

    share: float = 0.5
    passes: int = 2
    percentiles: tuple[float, ...] = _PERCENTILES
    metric: Literal["overlap", "hessian"] = "overlap"

    def _validate(self) -> None:
        self._require(0 < self.share < 1, "share", "between 0 and 1")
        self._require(self.passes >= 1, "passes", "1 or more")
        good = all(0.5 < p <= 1 for p in self.percentiles)
        self._require(good and len(self.percentiles) > 0, "percentiles", "some above 0.5, up to 1")


@dataclass(frozen=True)
class AttentionParts:
    """A quantized attention of the decoder.

    Attributes:
        owner: takes query, key and value before their projections.
        query: projection of the query.
        key: projection of the key.
        value: projection of the value.
        core: the attention itself.
    """

    owner: nn.Module
    query: QuantizedLayer
    key: QuantizedLayer
    value: QuantizedLayer
    core: QuantizedOperator

    def logits(self, query: Tensor, key: Tensor) -> Tensor:
        """What the softmax is taken of [batch, heads, n, m], with ranges as they are.

        Args:
            query: what comes to the attention [batch, heads, n, head_dim].
            key: the same [batch, heads, m, head_dim].
        """
        product = next(p.module for p in self.core.products() if p.first == QUERY)
        operands = self.core.quantizer(QUERY)(query), self.core.quantizer(KEY)(key)
        logits: Tensor = product(*operands)
        return logits

    def slots(self) -> dict[str, AffineQuantizer]:
        """Quantizers whose ranges are chosen, in their order, by slot; affine ones only."""
        found = {
            QUERY_INPUT: self.query.quantizer(INPUT),
            KEY_INPUT: self.key.quantizer(INPUT),
            QUERY: self.core.quantizer(QUERY),
            KEY: self.core.quantizer(KEY),
        }
        affine = {slot: quantizer.as_affine() for slot, quantizer in found.items()}
        return {slot: quantizer for slot, quantizer in affine.items() if quantizer is not None}


def mask_of(logits: Tensor, share: float) -> Tensor:
    """Places above a share of each query's largest attention, booleans in the shape of [..., n, m].

    By logits: of a softmax's numbers, the quotient is what their difference says.
    """
    return logits > logits.amax(-1, keepdim=True) + math.log(share)


def mask_loss(found: Tensor, wanted: Tensor) -> float:
    """1 less intersection over union of masks [batch, heads, n, m], averaged over the first two."""
    both = (found & wanted).sum((-2, -1), dtype=torch.float64)
    either = (found | wanted).sum((-2, -1), dtype=torch.float64)
    return float((1 - both / either.clamp(min=1)).mean())


def percentile_ranges(x: Tensor, percentiles: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
    """Ranges from the 1 - p to the p quantile of the last axis, of many numbers some."""
    values = x.detach().float()
    values = values[..., :: max(1, values.shape[-1] // _MOST)].sort().values.movedim(-1, 0)
    last = len(values) - 1
    ranges = []
    for percentile in percentiles:
        place = percentile * last
        low, high = int(last - place), min(last, int(place) + 1)
        ends = (
            torch.lerp(values[low], values[min(last, low + 1)], (last - place) - low),
            torch.lerp(values[high - 1], values[high], place - (high - 1)),
        )
        ranges.append(ends)
    return ranges


@METHODS.register("pcc")
class PccMethod(Method[Pcc]):
    """Of the mask decoder's attentions, on the first calibration picture and its first boxes."""

    settings_type = Pcc

    def after_ranges(self, calibration: Calibration) -> Sequence[str]:
        """Choose ranges; one that is not better than the observed one stays."""
        parts: dict[str, AttentionParts] = calibration.sam.attention_parts()
        transformer = calibration.sam.transformer
        changed: dict[str, None] = {}
        with quantizer_mode(calibration.sam, Mode.FLOAT):
            given = _first_inputs(transformer, calibration)
            inputs = _run(transformer, given, parts)
            weights = self._weights(calibration, parts, len(given[0]))
            goals = {
                name: self._goal(attention, inputs[name], weights.get(name))
                for name, attention in parts.items()
            }
            for _ in range(self.settings.passes):
                for name, attention in parts.items():
                    (came,) = _run(transformer, given, {name: attention}).values()
                    for slot in self._choose(attention, came, goals[name]):
                        changed[f"{name}: {slot}"] = None
        return list(changed)

    def _weights(
        self, calibration: Calibration, parts: dict[str, AttentionParts], boxes: int
    ) -> dict[str, Tensor]:
        """What errors of the outputs weigh, for the first boxes; nothing where masks overlap."""
        if self.settings.metric == "overlap":
            return {}
        item = calibration.items[0]
        owners = {name: part.owner for name, part in parts.items()}
        return squared_gradients(calibration.sam, item.pixels, item.boxes[:boxes], owners, seed=0)

    def _goal(
        self, parts: AttentionParts, inputs: tuple[Tensor, ...], weights: Tensor | None
    ) -> _Goal:
        if weights is not None:
            return _Goal(parts.owner(*inputs), weights)
        query, key, _ = _inputs_of(parts.owner, inputs, parts.core)
        return _Goal(mask_of(parts.logits(query, key), self.settings.share), None)

    def _choose(
        self, parts: AttentionParts, inputs: tuple[Tensor, ...], goal: _Goal
    ) -> Iterator[str]:
        """Choose the ranges of one attention and leave them on; yields slots that changed."""
        for slot, quantizer in parts.slots().items():
            quantizer.mode = Mode.FLOAT
            values = _inputs_of(parts.owner, inputs, quantizer)[0]
            quantizer.mode = Mode.QUANTIZE
            loss = self._loss(parts, slot, inputs, goal)
            kept = best = (quantizer.scale.detach().clone(), quantizer.zero_point.detach().clone())
            least = loss()
            if quantizer.channel_axis is None:
                values = values.flatten()
            else:
                # Of heads with scales each has the percentile of its own numbers.
                values = values.movedim(quantizer.channel_axis, 0).flatten(1)
            for low, high in percentile_ranges(values, self.settings.percentiles):
                tried = quantizer.grid.affine_parameters(low, high)
                quantizer.set_parameters(*tried)
                if (its := loss()) < least:
                    least, best = its, tried
            quantizer.set_parameters(*best)
            if best is not kept:
                yield slot

    def _loss(
        self, parts: AttentionParts, slot: str, inputs: tuple[Tensor, ...], goal: _Goal
    ) -> Callable[[], float]:
        """The loss of an attention with these inputs, as ranges of one slot change."""
        weights = goal.weights
        if weights is not None:

            def of_output() -> float:
                errors = (parts.owner(*inputs) - goal.wanted).square() * weights
                return float(errors.sum(dtype=torch.float64))

            return of_output
        query, key, _ = _inputs_of(parts.owner, inputs, parts.core)
        heads = query.shape[1]

        def of_masks() -> float:
            # Only what changes with the slot is projected again.
            changed = (
                _by_head(parts.query(inputs[0]), heads) if slot == QUERY_INPUT else query,
                _by_head(parts.key(inputs[1]), heads) if slot == KEY_INPUT else key,
            )
            return mask_loss(mask_of(parts.logits(*changed), self.settings.share), goal.wanted)

        return of_masks


@dataclass(frozen=True)
class _Goal:
    """What an attention of the float model gives.

    Attributes:
        wanted: the mask of where it looks, or what is behind its last projection.
        weights: of squared errors of that, in its shape; None where masks are compared.
    """

    wanted: Tensor
    weights: Tensor | None


def _first_inputs(transformer: nn.Module, calibration: Calibration) -> tuple[Tensor, ...]:
    """What the decoder's transformer is given first for the first picture."""
    found: list[tuple[Tensor, ...]] = []
    handle = transformer.register_forward_pre_hook(lambda _module, inputs: found.append(inputs))
    try:
        calibration.run(calibration.items[0])
    finally:
        handle.remove()
    return found[0]


def _run(
    transformer: nn.Module, given: tuple[Tensor, ...], parts: dict[str, AttentionParts]
) -> dict[str, tuple[Tensor, ...]]:
    """Pass through the transformer as it is; returns what came to attentions."""
    found: dict[str, tuple[Tensor, ...]] = {}

    def see(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, inputs: found.update({name: inputs})

    with ExitStack() as hooks:
        for name, attention in parts.items():
            hooks.callback(attention.owner.register_forward_pre_hook(see(name)).remove)
        transformer(*given)
    return found


def _by_head(projected: Tensor, heads: int) -> Tensor:
    """[batch, tokens, dim] to [batch, heads, tokens, dim / heads]."""
    return projected.reshape(*projected.shape[:2], heads, -1).transpose(1, 2)


def _inputs_of(owner: nn.Module, inputs: tuple[Tensor, ...], part: nn.Module) -> tuple[Tensor, ...]:
    """What comes to a part of an attention when that is run."""
    found: list[tuple[Tensor, ...]] = []
    handle = part.register_forward_pre_hook(lambda _module, given: found.append(given))
    try:
        owner(*inputs)
    finally:
        handle.remove()
    return found[0]
