"""What the quantizers of a model see: histograms, ranges by channel, and their grids.

One calibration picture is run through the float model and once through the finished quantized one,
with quantizers on. That costs about what two calibration pictures do.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ptq4sam.methods.bimodal import key_density
from ptq4sam.model.calibration import CalibrationItem, run_item
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.operators.base import KEY, SOFTMAX, quantized_layers, quantized_operators
from ptq4sam.quantization.modes import dropping
from ptq4sam.quantization.published import BIMODAL, BimodalIntegration
from ptq4sam.quantization.quantizers import Quantizer
from ptq4sam.records import Record
from ptq4sam.sam.description import TRANSFORMER, network_of
from ptq4sam.sam.model import Sam

BINS = 96
"""Of every histogram."""
SOFTMAX_LOW = -24.0
"""log2 of a softmax output where its histogram begins: smaller ones, and zero, are in bin 0."""
MOST_CHANNELS = 256
"""Ranges that are kept of a tensor: of more channels those of neighbours are joined."""
_LOOKED_AT = 2**20
"""About so many values of a tensor, evenly spread, go into its histogram."""


@dataclass(frozen=True)
class Histogram(Record):
    """Counts in bins of equal width between two ends."""

    low: float
    high: float
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Density(Record):
    """A kernel estimate at evenly spaced points between two ends, and where its peaks are."""

    low: float
    high: float
    values: tuple[float, ...]
    peaks: tuple[float, ...]


@dataclass(frozen=True)
class Range(Record):
    """What a quantizer can represent.

    Attributes:
        bits: of its codes.
        low: the smallest value.
        high: the largest.
    """

    bits: int
    low: float
    high: float


@dataclass(frozen=True)
class ChannelRanges(Record):
    """Smallest and largest value of each channel.

    Attributes:
        channels: how many there are.
        together: how many neighbours share an entry.
        low: of each entry.
        high: of each entry.
    """

    channels: int
    together: int
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class Keys(Record):
    """Post-key activations of an attention.

    Attributes:
        histogram: of the first batch element's values; in the image encoder of all.
        channels: their ranges.
        density: where bimodal integration looks for peaks: attentions from tokens to the image.
    """

    histogram: Histogram
    channels: ChannelRanges
    density: Density | None = None


@dataclass(frozen=True)
class Softmax(Record):
    """Softmax outputs of an attention.

    Attributes:
        histogram: of their base-2 logarithms.
        bits: of the quantizer's codes.
        scale: its largest point where `tau` is one, else the step.
        tau: chosen granularity; None for evenly spaced points.
        zero_point: code of 0 of evenly spaced points.
        points: those above 0 of a grid of another kind, the smallest first.
    """

    histogram: Histogram
    bits: int
    scale: float
    tau: int | None = None
    zero_point: int = 0
    points: tuple[float, ...] | None = None

    def levels(self) -> list[float]:
        """The base-2 logarithms of all points but 0, the largest first."""
        if self.points is not None:
            return [math.log2(point) for point in reversed(self.points)]
        codes = range(2**self.bits)
        if self.tau is not None:
            return [math.log2(self.scale) - code / self.tau for code in codes]
        points = [(code - self.zero_point) * self.scale for code in codes]
        return [math.log2(point) for point in reversed(points) if point > 0]


@dataclass(frozen=True)
class AttentionRecord(Record):
    """One quantized attention.

    Attributes:
        name: its path.
        folded: whether bimodal integration folded signs into it.
        keys: as its quantizer sees them in the quantized model.
        key_range: of that quantizer.
        softmax: its outputs, in the quantized model.
        float_keys: in the float model, before bimodal integration; of the mask decoder only.
    """

    name: str
    folded: bool
    keys: Keys
    key_range: Range
    softmax: Softmax
    float_keys: Keys | None = None


@dataclass(frozen=True)
class LayerRecord(Record):
    """Input of one quantized layer, in the quantized model."""

    name: str
    channels: ChannelRanges
    range: Range


@dataclass(frozen=True)
class Distributions(Record):
    """All of a model, in the order of its modules."""

    attentions: tuple[AttentionRecord, ...]
    layers: tuple[LayerRecord, ...]


@torch.no_grad()
def observe_distributions(
    float_sam: Sam, quantized: QuantizedSam, item: CalibrationItem
) -> Distributions:
    """Run a picture through both models and keep what their quantizers see.

    Args:
        float_sam: the model that `quantized` was made of.
        quantized: the finished model.
        item: the first calibration picture, by which bimodal integration decides.

    Raises:
        CalibrationError: a key is not finite.
    """
    scheme = quantized.scheme
    methods = cast(BimodalIntegration, scheme.method_settings.get(BIMODAL, scheme.ptq4sam.bimodal))
    attentions = {n: o for n, o in quantized_operators(quantized) if SOFTMAX in o.slot_names}
    before: dict[str, Keys] = {}
    with contextlib.ExitStack() as hooks:
        for name in attentions:
            if network_of(name) == "decoder":
                foldable = _is_foldable(quantized, name)
                keep = partial(_keep_float_keys, before, name, methods, foldable)
                hooks.callback(float_sam.get_submodule(name).register_forward_pre_hook(keep).remove)
        run_item(float_sam, item)
    seen = _Seen()
    # Under compat: published elements stay float at random, and drawing here would change what is
    # evaluated later.
    with dropping(quantized, 0.0, None), contextlib.ExitStack() as hooks:
        for name, operator in attentions.items():
            see_keys = partial(
                seen.keys,
                name,
                methods,
                network_of(name) == "decoder",
                _is_foldable(quantized, name),
            )
            _watch(hooks, operator.quantizer(KEY), see_keys)
            _watch(hooks, operator.quantizer(SOFTMAX), partial(seen.softmax, name))
        for name, layer in quantized_layers(quantized):
            # Channels are on the last axis of a linear layer's input, on the second of others'.
            axis = -1 if layer.weight.dim() == 2 else 1
            _watch(hooks, layer.input_quantizer, partial(seen.layer, name, axis))
        run_item(quantized, item)
    folded = {f"{TRANSFORMER}.{name}" for name in quantized.folded}
    return Distributions(
        tuple(
            AttentionRecord(
                name.rpartition(".")[0],
                name.rpartition(".")[0] in folded,
                seen.of_keys[name],
                _range(operator.quantizer(KEY)),
                _softmax(operator.quantizer(SOFTMAX), seen.of_softmax[name]),
                before.get(name),
            )
            for name, operator in attentions.items()
        ),
        tuple(
            LayerRecord(name, seen.of_layers[name], _range(layer.input_quantizer))
            for name, layer in quantized_layers(quantized)
        ),
    )


def _is_foldable(sam: Sam, attention: str) -> bool:
    """Whether bimodal integration looks at the keys of an attention."""
    return sam.description.foldable_at(attention.rpartition(".")[0]) is not None


@dataclass
class _Seen:
    """What was seen, by path: the first call's, but for softmax outputs, which come in pieces."""

    of_keys: dict[str, Keys] = field(default_factory=dict)
    of_softmax: dict[str, Tensor] = field(default_factory=dict)
    of_layers: dict[str, ChannelRanges] = field(default_factory=dict)

    def keys(
        self, name: str, methods: BimodalIntegration, decoder: bool, foldable: bool, x: Tensor
    ) -> None:
        """Keys [batch, heads, tokens, head_dim]."""
        if name not in self.of_keys:
            self.of_keys[name] = _keys(x, methods, decoder, foldable)

    def softmax(self, name: str, x: Tensor) -> None:
        """Softmax outputs [batch, heads, queries, keys]."""
        rows = x.reshape(-1, x.shape[-1])
        some = rows[:: max(1, rows.numel() // _LOOKED_AT)]
        bins = (some.clamp(min=2.0**SOFTMAX_LOW).log2() - SOFTMAX_LOW) * (BINS / -SOFTMAX_LOW)
        counts = torch.bincount(bins.long().clamp(0, BINS - 1).flatten(), minlength=BINS).cpu()
        self.of_softmax[name] = self.of_softmax.get(name, torch.zeros_like(counts)) + counts

    def layer(self, name: str, axis: int, x: Tensor) -> None:
        """Input of a layer, with its channels on an axis."""
        if name not in self.of_layers:
            self.of_layers[name] = channel_ranges(x.movedim(axis, -1))


def _watch(hooks: contextlib.ExitStack, module: nn.Module, see: Callable[[Tensor], None]) -> None:
    def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        see(inputs[0])

    hooks.callback(module.register_forward_pre_hook(hook).remove)


def _keep_float_keys(
    found: dict[str, Keys],
    name: str,
    methods: BimodalIntegration,
    foldable: bool,
    _module: nn.Module,
    inputs: tuple[Any, ...],
) -> None:
    if name not in found:
        found[name] = _keys(inputs[1], methods, True, foldable)


def _keys(by_head: Tensor, methods: BimodalIntegration, decoder: bool, foldable: bool) -> Keys:
    """Of keys [batch, heads, tokens, head_dim]; a channel is one of a head."""
    x = by_head.transpose(1, 2).flatten(2)
    density = None
    if foldable:
        estimated = key_density(x, methods)
        if len(estimated.points):
            density = Density(
                float(estimated.points[0]),
                float(estimated.points[-1]),
                tuple(_short(estimated.values.tolist())),
                tuple(estimated.points[estimated.peaks].tolist()),
            )
    return Keys(histogram(x[0] if decoder else x), channel_ranges(x), density)


def histogram(x: Tensor) -> Histogram:
    """Of the values of a tensor of any shape, some where there are many."""
    values = x.detach().float().flatten()
    low, high = (float(end) for end in torch.aminmax(values))
    counts = torch.histc(values[:: max(1, values.numel() // _LOOKED_AT)], BINS, low, high)
    return Histogram(low, high, tuple(int(count) for count in counts.tolist()))


def channel_ranges(x: Tensor) -> ChannelRanges:
    """Of a tensor with its channels on the last axis."""
    values = x.detach().reshape(-1, x.shape[-1])
    low, high = values.amin(dim=0).tolist(), values.amax(dim=0).tolist()
    together = math.ceil(len(low) / MOST_CHANNELS)
    starts = range(0, len(low), together)
    return ChannelRanges(
        len(low),
        together,
        tuple(_short(min(low[start : start + together]) for start in starts)),
        tuple(_short(max(high[start : start + together]) for start in starts)),
    )


def _short(values: Any) -> Iterator[float]:
    """To four significant digits, which is more than a plot shows."""
    return (float(f"{value:.4g}") for value in values)


def _range(quantizer: Quantizer) -> Range:
    return Range(quantizer.grid.bits, *quantizer.grid_in_use().ends())


def _softmax(quantizer: Quantizer, counts: Tensor) -> Softmax:
    seen = Histogram(SOFTMAX_LOW, 0.0, tuple(int(count) for count in counts.tolist()))
    return Softmax(seen, quantizer.grid.bits, **quantizer.grid_in_use().facts())
