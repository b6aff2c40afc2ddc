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

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ptq4sam.methods.method import METHODS, Calibration, Method
from ptq4sam.methods.task_gradients import squared_gradients
from ptq4sam.operators.base import INPUT, KEY, QUERY, SOFTMAX, QuantizedLayer, QuantizedOperator
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

    @property
    def weighs(self) -> nn.Module:
        """What multiplies softmax outputs and values."""
        return next(p.module for p in self.core.products() if p.first == SOFTMAX)

    def slots(self) -> dict[str, AffineQuantizer]:
        """Quantizers whose ranges are chosen, in their order, by slot; affine ones only."""
        found = {
            "query projection's input": self.query.quantizer(INPUT),
            "key projection's input": self.key.quantizer(INPUT),
            QUERY: self.core.quantizer(QUERY),
            KEY: self.core.quantizer(KEY),
        }
        affine = {slot: quantizer.as_affine() for slot, quantizer in found.items()}
        return {slot: quantizer for slot, quantizer in affine.items() if quantizer is not None}


def mask_of(attention: Tensor, share: float) -> Tensor:
    """Places above a share of each query's largest, booleans in the shape of [..., n, m]."""
    return attention > share * attention.amax(-1, keepdim=True)


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
            seen = _run(transformer, given, parts)
            weights = self._weights(calibration, parts, len(given[0]))
            goals = {
                name: _Goal(
                    mask_of(one.attention(), self.settings.share), one.output, weights.get(name)
                )
                for name, one in seen.items()
            }
            for _ in range(self.settings.passes):
                for name, attention in parts.items():
                    seen = _run(transformer, given, {name: attention})
                    for slot in self._choose(attention, seen[name], goals[name]):
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

    def _choose(self, parts: AttentionParts, seen: _Seen, goal: _Goal) -> Iterator[str]:
        """Choose the ranges of one attention and leave them on; yields slots that changed."""
        for slot, quantizer in parts.slots().items():
            quantizer.mode = Mode.FLOAT
            values = _inputs_of(parts.owner, seen.inputs, quantizer)[0]
            quantizer.mode = Mode.QUANTIZE
            asked: tuple[nn.Module, tuple[Tensor, ...]] = parts.owner, seen.inputs
            if goal.weights is None and slot in (QUERY, KEY):
                # Where it looks follows from what comes to the attention itself.
                asked = parts.core, _inputs_of(parts.owner, seen.inputs, parts.core)
            kept = best = (quantizer.scale.detach().clone(), quantizer.zero_point.detach().clone())
            least = self._loss(parts, asked, goal)
            if quantizer.channel_axis is None:
                values = values.flatten()
            else:
                # Of heads with scales each has the percentile of its own numbers.
                values = values.movedim(quantizer.channel_axis, 0).flatten(1)
            for low, high in percentile_ranges(values, self.settings.percentiles):
                tried = quantizer.grid.affine_parameters(low, high)
                quantizer.set_parameters(*tried)
                loss = self._loss(parts, asked, goal)
                if loss < least:
                    least, best = loss, tried
            quantizer.set_parameters(*best)
            if best is not kept:
                yield slot

    def _loss(
        self, parts: AttentionParts, asked: tuple[nn.Module, tuple[Tensor, ...]], goal: _Goal
    ) -> float:
        """Of the attention, or its core, with these inputs."""
        seen, (module, inputs) = _Seen(), asked
        with _watching(parts, seen, module):
            module(*inputs)
        if goal.weights is None:
            return mask_loss(mask_of(seen.attention(), self.settings.share), goal.mask)
        errors = (seen.output - goal.output).square() * goal.weights
        return float(errors.sum(dtype=torch.float64))


@dataclass(frozen=True)
class _Goal:
    """What an attention of the float model gives.

    Attributes:
        mask: of its softmax outputs.
        output: behind its last projection.
        weights: of squared errors of the output, in its shape; None where masks are compared.
    """

    mask: Tensor
    output: Tensor
    weights: Tensor | None


@dataclass
class _Seen:
    """What an attention saw when it was first called.

    Attributes:
        inputs: of its owner, or of its core.
        pieces: softmax outputs [batch, heads, n, m] in pieces: rows within heads.
        queries: how many there are in all.
        output: of the same.
    """

    inputs: tuple[Tensor, ...] = ()
    pieces: list[Tensor] = field(default_factory=list)
    queries: int = 0
    output: Tensor = field(default_factory=lambda: torch.empty(0, device="cpu"))

    def attention(self) -> Tensor:
        """All pieces together."""
        heads, rows = [], []
        for piece in self.pieces:
            rows.append(piece)
            if sum(part.shape[-2] for part in rows) == self.queries:
                heads.append(torch.cat(rows, dim=-2))
                rows = []
        return torch.cat(heads, dim=1)


@contextmanager
def _watching(parts: AttentionParts, seen: _Seen, module: nn.Module) -> Iterator[None]:
    """Keep what the first call of an attention, or of its core, sees."""
    calls = 0

    def begin(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            seen.inputs, seen.queries = inputs, inputs[0].shape[-2]

    def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if calls == 1:
            seen.pieces.append(inputs[0].detach())

    def end(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if calls == 1:
            seen.output = output

    handles = [
        module.register_forward_pre_hook(begin),
        module.register_forward_hook(end),
        parts.weighs.register_forward_pre_hook(keep),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
) -> dict[str, _Seen]:
    """Pass through the transformer as it is; returns what attentions saw."""
    seen = {name: _Seen() for name in parts}
    with ExitStack() as watches:
        for name, attention in parts.items():
            watches.enter_context(_watching(attention, seen[name], attention.owner))
        transformer(*given)
    return seen


def _inputs_of(owner: nn.Module, inputs: tuple[Tensor, ...], part: nn.Module) -> tuple[Tensor, ...]:
    """What comes to a part of an attention when that is run."""
    found: list[tuple[Tensor, ...]] = []
    handle = part.register_forward_pre_hook(lambda _module, given: found.append(given))
    try:
        owner(*inputs)
    finally:
        handle.remove()
    return found[0]
