"""Drawings of what quantizers see: keys, softmax outputs, ranges by channel."""

from __future__ import annotations

from collections.abc import Sequence

from ptq4sam.model.distributions import (
    AttentionRecord,
    ChannelRanges,
    Histogram,
    Keys,
    LayerRecord,
    Range,
)
from ptq4sam.report.figures import (
    FLOAT,
    INK,
    QUANTIZED,
    THIRD,
    axes,
    histogram,
    legend,
    span,
    svg,
    title,
)
from ptq4sam.report.page import Plot

_MOST_LEVELS_DRAWN = 6
"""Bits up to which every level of a quantizer is drawn."""


def key_plot(attention: AttentionRecord) -> Plot:
    """Post-key histograms: of the float model where it is known, and of the quantized one."""
    parts = [(attention.keys, QUANTIZED, "quantized model")]
    if attention.float_keys is not None:
        before = "before, float model" if attention.folded else "float model"
        after = "after, quantized model" if attention.folded else "quantized model"
        parts = [(attention.float_keys, FLOAT, before), (attention.keys, QUANTIZED, after)]
    figure, rows = axes(
        "post-key activation", "density", len(parts), height=1.35 + 0.95 * len(parts)
    )
    for one, (keys, colour, name) in zip(rows, parts, strict=True):
        seen = keys.histogram
        histogram(one, seen.low, seen.high, _densities(seen), colour)
        if keys.density is not None:
            values = keys.density.values
            width = (keys.density.high - keys.density.low) / max(1, len(values) - 1)
            places = [keys.density.low + width * index for index in range(len(values))]
            one.plot(places, values, color=INK, linewidth=1)
            heights = [values[round((peak - places[0]) / width)] for peak in keys.density.peaks]
            one.plot(keys.density.peaks, heights, "v", color=INK, markersize=6, clip_on=False)
        one.set_ylim(0, 1.12 * max(one.get_ylim()[1], 1e-12))
        one.set_yticks([])
        title(one, name)
    span(rows[-1], attention.key_range.low, attention.key_range.high)
    caption = f"{_peaks(attention)}; dashed: the {_range_text(attention.key_range)}."
    drawn = svg(figure, f"Histogram of post-key activations of {attention.name}: {caption}")
    return Plot(drawn, caption, attention.name)


def _peaks(attention: AttentionRecord) -> str:
    def found(keys: Keys | None) -> str:
        count = 0 if keys is None or keys.density is None else len(keys.density.peaks)
        return f"{count} peak{'' if count == 1 else 's'}"

    before = attention.float_keys
    if before is None or before.density is None:
        return "not a candidate of bimodal integration"
    if attention.folded:
        return f"{found(before)} before, {found(attention.keys)} after folding the signs"
    return f"{found(before)}, signs were not folded"


def _range_text(found: Range) -> str:
    return f"{found.bits}-bit quantizer's range, {found.low:.3g} to {found.high:.3g}"


def _densities(seen: Histogram) -> list[float]:
    total = max(1, sum(seen.counts)) * max((seen.high - seen.low) / len(seen.counts), 1e-12)
    return [count / total for count in seen.counts]


def softmax_plot(attention: AttentionRecord) -> Plot:
    """Softmax outputs over their base-2 logarithm, with the quantizer's levels."""
    softmax, seen = attention.softmax, attention.softmax.histogram
    figure, (one,) = axes("log2 of softmax output", "share of values, %")
    total = max(1, sum(seen.counts))
    shares = [100 * count / total for count in seen.counts]
    histogram(one, seen.low, seen.high, shares, THIRD)
    many = softmax.bits > _MOST_LEVELS_DRAWN
    levels = [] if softmax.bits > 8 else softmax.levels()
    lowest = levels[-1] if levels else seen.low
    if levels:
        lines = [levels[0], levels[-1]] if many else levels
        one.vlines(lines, 0, max(shares) * 1.08, color=INK, linewidth=0.7, alpha=0.75)
        one.axvspan(seen.low, max(seen.low, lowest), color=INK, alpha=0.08, linewidth=0)
    one.set_xlim(seen.low, seen.high + 0.6)
    one.set_ylim(0, max(shares) * 1.08)
    one.set_xticks([-24, -20, -16, -12, -8, -4, 0], ["≤ -24", "-20", "-16", "-12", "-8", "-4", "0"])
    if softmax.tau is not None:
        spacing = {1: "2", 2: "√2", 4: "⁴√2"}.get(softmax.tau, f"2^(1/{softmax.tau})")
        chosen = f"chosen τ = {softmax.tau}, levels a factor of {spacing} apart"
    elif softmax.points is not None:
        chosen = f"levels of a grid of its own, whole multiples of {softmax.scale:.3g}"
    else:
        chosen = f"evenly spaced levels, step {softmax.scale:.3g}"
    top = (
        f"{2**softmax.bits} levels up to {2 ** levels[0]:.3g}" if levels else f"{softmax.bits} bits"
    )
    below = sum(shares[: max(0, round((lowest - seen.low) * len(shares) / -seen.low))])
    caption = f"{chosen}, {top}; {below:.1f} % of the values lie below the last."
    drawn = svg(figure, f"Histogram of softmax outputs of {attention.name}: {caption}")
    return Plot(drawn, caption, attention.name)


def key_channels_plot(attention: AttentionRecord) -> Plot:
    """Ranges of a key's channels before and after."""
    parts = [("quantized model", attention.keys.channels, QUANTIZED)]
    if attention.float_keys is not None:
        parts.insert(0, ("float model", attention.float_keys.channels, FLOAT))
    return _channels_plot(parts, attention.key_range, attention.name)


def layer_plot(layer: LayerRecord) -> Plot:
    """Ranges of the channels that go into a layer."""
    parts = [("input", layer.channels, QUANTIZED)]
    return _channels_plot(parts, layer.range, layer.name)


def _channels_plot(
    parts: Sequence[tuple[str, ChannelRanges, str]], limits: Range, name: str
) -> Plot:
    figure, (one,) = axes("channel", "smallest to largest value")
    for index, (label, found, colour) in enumerate(parts):
        places = [place * found.together for place in range(len(found.low) + 1)]
        if index == 0:
            one.stairs(
                found.high,
                places,
                baseline=found.low,
                fill=True,
                color=colour,
                alpha=0.5,
                linewidth=0,
                label=label,
            )
            continue
        # Over another one only its ends, or neither would be seen.
        for ends in (found.low, found.high):
            one.stairs(ends, places, baseline=None, color=colour, linewidth=1.1, label=label)
            label = ""
    span(one, limits.low, limits.high, horizontal=True)
    one.set_xlim(0, parts[0][1].channels)
    if len(parts) > 1:
        legend(one)
        low, high = one.get_ylim()
        one.set_ylim(low, high + 0.22 * (high - low))
    last = parts[-1][1]
    joined = f", {last.together} neighbours joined" if last.together > 1 else ""
    caption = f"{last.channels} channels{joined}; dashed: the {_range_text(limits)}."
    return Plot(svg(figure, f"Ranges of the channels of {name}: {caption}"), caption, name)
