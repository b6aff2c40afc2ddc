"""The sections of a run's report that show models: distributions, losses, sensitivity, cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ptq4sam.model.distributions import Distributions
from ptq4sam.model.insertion import ENCODER
from ptq4sam.report.distribution_plots import (
    key_channels_plot,
    key_plot,
    layer_plot,
    softmax_plot,
)
from ptq4sam.report.figures import FLOAT, INK, QUANTIZED, THIRD, axes, bars, logarithmic_y, svg
from ptq4sam.report.page import Block, Plot, Plots, Section, Table, Text
from ptq4sam.runs.record import PartRecord, UnitRecord
from ptq4sam.sam.description import TRANSFORMER

_SHOWN_TARGETS = 15


def keys_section(found: Distributions) -> Section:
    """Post-key histograms, those that bimodal integration decides about first."""
    candidates = [a for a in found.attentions if a.keys.density is not None]
    folded = [a.name for a in candidates if a.folded]
    told = ", ".join(folded) if folded else "none"
    intro = (
        "Keys after the key projection, of the first calibration picture. Bimodal integration "
        "looks at attentions from tokens to the image: where the kernel density (line) of the "
        "float model's keys has exactly two peaks (triangles), it flips the signs of channels in "
        f"query and key, so that one peak is left. Folded: {told}."
    )
    others = [a for a in found.attentions if a.keys.density is None]
    blocks: list[Block] = [Plots("Candidates", [key_plot(a) for a in candidates])]
    blocks += _by_part(others, lambda a: a.name, key_plot, "Other attentions")
    return Section("keys", "Post-key activations", blocks, intro)


def softmax_section(found: Distributions) -> Section:
    """Softmax histograms with levels."""
    intro = (
        "Softmax outputs of the quantized model on the first calibration picture, over their "
        "base-2 logarithm, with the levels of the quantizer (vertical lines). Values in the grey "
        "part are below the lowest level: they become it, or 0. A larger τ puts levels closer "
        "together and covers less."
    )
    blocks = _by_part(found.attentions, lambda a: a.name, softmax_plot, "Attentions", first=True)
    rows = [
        [a.name, str(a.softmax.tau), f"{a.softmax.scale:.4g}"]
        for a in found.attentions
        if a.softmax.tau is not None
    ]
    if rows:
        head = ["attention", "τ", "scale"]
        blocks.append(Table("Chosen granularity of each attention", head, rows))
    return Section("softmax", "Softmax outputs", blocks, intro)


def channels_section(found: Distributions) -> Section:
    """Ranges by channel of keys and of layers' inputs."""
    intro = (
        "Smallest and largest value of each channel on the first calibration picture, beside the "
        "range of the one quantizer that all channels share (dashed). What lies outside of it is "
        "clipped; a channel that is much narrower than it gets few levels."
    )
    decoder = [a for a in found.attentions if not a.name.startswith(ENCODER)]
    blocks: list[Block] = [
        Plots("Keys of the mask decoder", [key_channels_plot(a) for a in decoder])
    ]
    blocks += _by_part(found.layers, lambda one: one.name, layer_plot, "Inputs of layers")
    return Section("channels", "Ranges by channel", blocks, intro)


def _by_part(
    found: Iterable[Any],
    name: Callable[[Any], str],
    draw: Callable[[Any], Plot],
    title: str,
    first: bool = False,
) -> list[Block]:
    """Drawings in two groups, mask decoder and image encoder; the first is open if `first`."""
    groups: dict[str, list[Any]] = {"mask decoder": [], "image encoder": []}
    for one in found:
        groups["image encoder" if name(one).startswith(ENCODER) else "mask decoder"].append(one)
    return [
        Plots(f"{title}, {part} ({len(members)})", [draw(one) for one in members], first and not i)
        for i, (part, members) in enumerate(groups.items())
        if members
    ]


def losses_section(units: Sequence[UnitRecord]) -> Section:
    """Loss curves."""
    intro = (
        "Squared error of a unit's output against the float model's, while it learns rounding and "
        "scales (line: means over equal numbers of steps, of single calibration pictures and with "
        "QDrop's dropping where the scheme has it), and over all calibration pictures before and "
        "after (dotted and dashed: nothing dropped)."
    )
    rows = [
        [u.name, f"{u.before:.4g}", f"{u.after:.4g}", _change(u), str(u.steps), _kept(u)]
        for u in units
    ]
    head = ["unit", "error before", "error after", "change, %", "steps", "note"]
    table = Table("Error of each unit over all calibration pictures", head, rows)
    plots = Plots(f"Curves of all {len(units)} units", [loss_plot(unit) for unit in units])
    return Section("losses", "Reconstruction", [plots, table], intro)


def _kept(unit: UnitRecord) -> str:
    return "worse by learning: left rounded to nearest" if unit.fell_back else ""


def _change(unit: UnitRecord) -> str:
    return f"{100 * (unit.after / unit.before - 1):+.1f}" if unit.before > 0 else "-"


def loss_plot(unit: UnitRecord) -> Plot:
    """The curve of one unit."""
    figure, (one,) = axes("step", "squared error")
    if unit.curve:
        every = unit.steps / len(unit.curve)
        steps = [(index + 0.5) * every for index in range(len(unit.curve))]
        one.plot(steps, unit.curve, color=THIRD, linewidth=1.4)
    one.axhline(unit.before, color=INK, linewidth=1, linestyle=":")
    one.axhline(unit.after, color=INK, linewidth=1, linestyle=(0, (4, 2)))
    values = [value for value in (*unit.curve, unit.before, unit.after) if value > 0]
    if values and max(values) / min(values) > 20:
        logarithmic_y(one)
    caption = f"{unit.before:.4g} before, {unit.after:.4g} after {unit.steps} steps"
    if unit.fell_back:
        caption += "; worse by learning, so left rounded to nearest"
    return Plot(svg(figure, f"Loss curve of {unit.name}: {caption}"), f"{caption}.", unit.name)


def sensitivity_section(content: Mapping[str, Any] | None) -> Section:
    """Bars of what single parts cost."""
    if content is None:
        text = (
            "Not measured for this run: ptq4sam sensitivity quantizes one unit or quantizer at a "
            "time, and all but one; its sensitivity.json in this folder is shown here."
        )
        return Section("sensitivity", "Sensitivity", [Text(text)])
    grains = list(dict.fromkeys(target["grain"] for target in content["targets"]))
    blocks: list[Block] = []
    for grain in grains:
        targets = [target for target in content["targets"] if target["grain"] == grain]
        worst = sorted(targets, key=lambda target: target["rank"])[:_SHOWN_TARGETS]
        blocks.append(Plots(f"By {grain}", [_sensitivity_plot(worst, len(targets), grain)]))
        blocks.append(_sensitivity_table(worst, grain))
    pictures = content.get("pictures", {})
    others = "" if _measured_kinds(content["targets"]) == ["only"] else ", and all but this part"
    intro = (
        f"What quantization of one part does to the masks: this part alone quantized{others}. Loss "
        "of agreement: how far the mean IoU with the float model's masks is below 1. Measured on "
        f"{pictures.get('proxy', '?')} pictures, the worst on {pictures.get('measured', '?')}."
    )
    return Section("sensitivity", "Sensitivity", blocks, intro)


def _sensitivity_plot(targets: Sequence[Mapping[str, Any]], count: int, grain: str) -> Plot:
    colours = {"only": QUANTIZED, "all_but": FLOAT}
    titles = {"only": "this alone quantized", "all_but": "all but this"}
    series = [
        (titles[key], colours[key], [100 * (1 - target[key]["agreement"]) for target in targets])
        for key in _measured_kinds(targets)
    ]
    names = [target["name"].replace(f"{TRANSFORMER}.", "decoder.") for target in targets]
    names = [name.replace(f"{ENCODER}.", "encoder.") for name in names]
    caption = f"The {len(targets)} most sensitive of {count} parts by {grain}."
    drawn = bars(
        names, series, "loss of agreement, percentage points of IoU", f"Sensitivity. {caption}"
    )
    return Plot(drawn, caption, wide=True)


def _sensitivity_table(targets: Sequence[Mapping[str, Any]], grain: str) -> Table:
    columns = (
        ("agreement", "agreement", 3),
        ("mean_iou", "mean IoU", 3),
        ("AP", "AP, %", 2),
        ("logits_sqnr_db", "mask logits, dB", 1),
    )

    def cells(effect: Mapping[str, Any]) -> list[str]:
        values = ((effect.get(key), digits) for key, _, digits in columns)
        return ["" if value is None else f"{value:.{digits}f}" for value, digits in values]

    kinds = _measured_kinds(targets)
    titles = {"only": "alone", "all_but": "all but"}
    rows = [[t["name"], *(cell for kind in kinds for cell in cells(t[kind]))] for t in targets]
    head = ["part", *(f"{titles[kind]}: {c[1]}" for kind in kinds for c in columns)]
    return Table(f"Effects by {grain}", head, rows)


def _measured_kinds(targets: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which effects all targets have: a study of each alone has no other."""
    return [key for key in ("only", "all_but") if all(target[key] for target in targets)]


def cost_section(
    model: str, scheme: str, quantize_encoder: bool, image_size: int | None = None
) -> Section:
    """Size and operations against the float model, counted from the scheme."""
    import yaml

    from ptq4sam.deploy.cost import count
    from ptq4sam.deploy.operations import FLOAT_BITS
    from ptq4sam.quantization.scheme import Scheme

    found = count(
        model,
        Scheme.from_dict(yaml.safe_load(scheme)),
        quantize_encoder=quantize_encoder,
        image_size=image_size,
    )
    total = found.total
    parts = [part for part in found.parts if part.float_weight_bytes or part.macs]
    rows = [
        [
            part.name,
            f"{part.float_weight_bytes / 1e6:.3f}",
            f"{part.weight_bytes / 1e6:.3f}",
            f"{part.macs / 1e9:.3f}",
            f"{part.macs * FLOAT_BITS**2 / 1e12:.3f}",
            f"{part.bit_operations / 1e12:.3f}",
        ]
        for part in (*parts, total)
    ]
    head = [
        "part",
        "float32 MB",
        "quantized MB",
        "multiply- accumulates, 10⁹",
        "bit operations in float32, 10¹²",
        "quantized, 10¹²",
    ]
    held = [part for part in parts if part.float_weight_bytes]
    computed = [part for part in parts if part.macs]
    size = bars(
        [part.name for part in held],
        [
            ("float32", FLOAT, [part.float_weight_bytes / 1e6 for part in held]),
            ("quantized", QUANTIZED, [part.weight_bytes / 1e6 for part in held]),
        ],
        "weights, MB",
        "Bytes of the weights by part, float32 and quantized",
    )
    work = bars(
        [part.name for part in computed],
        [
            ("float32", FLOAT, [part.macs * FLOAT_BITS**2 / 1e12 for part in computed]),
            ("quantized", QUANTIZED, [part.bit_operations / 1e12 for part in computed]),
        ],
        "bit operations a picture, 10¹²",
        "Bit operations by part, float32 and quantized",
    )
    intro = (
        f"Of one picture and one box: {found.storage_ratio:.2f} times less storage and "
        f"{found.bit_operations_ratio:.1f} times fewer bit operations (multiply-accumulates times "
        "the bits of both operands) than in float32; what is not quantized counts at 32 bits."
    )
    plots = Plots("By part", [Plot(size, "Weights."), Plot(work, "Bit operations.")])
    table = Table("Size and operations by part", head, rows)
    return Section("cost", "Size and operations", [plots, table], intro)


def file_table(parts: Sequence[PartRecord]) -> Table:
    """The quantized file that was written."""
    rows = [
        [
            part.name,
            part.kind,
            f"{part.values:,}",
            f"{part.size / 1e6:.3f}",
            f"{part.float_size / 1e6:.3f}",
        ]
        for part in parts
    ]
    size, exact = sum(part.size for part in parts), sum(part.float_size for part in parts)
    caption = (
        f"The file that was written: {size / 1e6:.2f} MB, {size / max(exact, 1):.1%} of float32"
    )
    return Table(caption, ["part", "written as", "values", "MB", "float32 MB"], rows, texts=2)
