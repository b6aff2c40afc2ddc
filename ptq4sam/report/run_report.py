"""The report of one run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from ptq4sam.evaluation.bootstrap import paired_difference
from ptq4sam.report.figures import (
    FLOAT,
    INK,
    QUANTIZED,
    THIRD,
    axes,
    bars,
    histogram,
    svg,
    whole_numbers,
)
from ptq4sam.report.folder import SCHEME, RunFolder
from ptq4sam.report.page import (
    Banner,
    Block,
    Page,
    Pictures,
    Plot,
    Plots,
    Section,
    Table,
    Text,
    Tile,
)
from ptq4sam.report.run_sections import (
    channels_section,
    cost_section,
    file_table,
    keys_section,
    losses_section,
    sensitivity_section,
    softmax_section,
)
from ptq4sam.runs.record import RunRecord
from ptq4sam.runs.summary import COLUMNS

_LOG_LINES = 400
_BINS = 40
_SHARES = ("mean_iou", "agreement")
"""Scores in 0 to 1; the others are in percent."""


def run_page(run: RunFolder) -> Page:
    """What there is of a run, as a page."""
    metrics = run.metrics
    sections: list[Section] = []
    if any(key in metrics for key, _ in COLUMNS):
        sections.append(_scores_section(metrics, run.record))
    if run.record is not None:
        sections += _record_sections(run.record)
    if run.units:
        sections.append(losses_section(run.units))
    if run.scheme or run.sensitivity is not None:
        sections.append(sensitivity_section(run.sensitivity))
    if run.scheme:
        # A model that was quantized before says itself what of it is.
        asked = bool(metrics.get("asked", {}).get("quantize_encoder", True))
        encoder = metrics.get("encoder_quantized", asked)
        cost = cost_section(metrics["model"], run.scheme, encoder, metrics.get("image_size"))
        if run.record is not None and run.record.file:
            cost = Section(
                cost.id, cost.title, [*cost.blocks, file_table(run.record.file)], cost.intro
            )
        sections.append(cost)
    sections.append(_run_section(run))
    return Page(
        f"{_model(run)}: {_described(run)}",
        f"Report of {run.path}",
        sections,
        _tiles(metrics, run),
        _banners(run),
    )


def _model(run: RunFolder) -> str:
    """Name of the SAM, or of the folder where it is not known."""
    for content in (run.metrics, run.sensitivity or {}):
        if "model" in content:
            return str(content["model"])
    return run.path.resolve().name


def _described(run: RunFolder) -> str:
    if not run.ended:
        return "unfinished run"
    if not run.metrics:
        return "sensitivity"
    if not run.scheme:
        return "quantized model" if run.metrics.get("quantized") else "float model"
    scheme = yaml.safe_load(run.scheme)
    weights, activations = scheme["w_qconfig"]["bit"], scheme["a_qconfig"]["bit"]
    methods = [name for name in ("BIG", "AGQ") if scheme["ptq4sam"][name]]
    methods += ["reconstruction"] if scheme.get("recon") else []
    told = f"W{weights}A{activations}" + (f", {' + '.join(methods)}" if methods else "")
    encoder = run.metrics.get("encoder", "quantized")
    return told if encoder == "quantized" else f"{told}, image encoder {encoder}"


def _banners(run: RunFolder) -> list[Banner]:
    metrics, found = run.metrics, []
    if not run.ended:
        last = run.log[-1].strip() if run.log else "nothing was logged"
        done = f"{len(run.units)} units are reconstructed. " if run.units else ""
        found.append(
            Banner(
                f"This run has not ended: what follows is what there is. {done}Its log ends with: "
                f"{last}. Resume it to go on."
            )
        )
    if "warning" in metrics:
        found.append(Banner(f"Warning: {metrics['warning']}."))
    audit = metrics.get("audit")
    if audit is not None:
        passed = audit["passed"]
        found.append(Banner(f"The {audit['report'][0]}.", "note" if passed else "warning"))
    if metrics and run.record is None:
        found.append(
            Banner(
                "This run has no record.json (an older version wrote it, or it was deleted): "
                "distributions, losses and pictures are missing. Run it again to get them."
            )
        )
    return found


def _tiles(metrics: Mapping[str, Any], run: RunFolder) -> list[Tile]:
    tiles = []
    reference = metrics.get("float", {})
    for key, title in (("AP", "mask AP, %"), ("mean_iou", "mean IoU"), ("agreement", "agreement")):
        value = metrics.get(key)
        if value is None:
            continue
        note = "mean IoU with the float masks" if key == "agreement" else ""
        if reference.get(key) is not None:
            note = f"float {_score(key, reference[key])}, change {_difference(key, metrics)}"
        tiles.append(Tile(title, _score(key, value), note))
    if "pictures" in metrics:
        tiles.append(Tile("pictures", f"{metrics['pictures']:,}", f"{metrics['masks']:,} masks"))
    if run.record is not None and run.record.file:
        size = sum(part.size for part in run.record.file)
        exact = sum(part.float_size for part in run.record.file)
        note = f"{size / exact:.1%} of {exact / 1e6:.2f} MB float32"
        tiles.append(Tile("file, MB", f"{size / 1e6:.2f}", note))
    return tiles


def _score(key: str, value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.3f}" if key in _SHARES else f"{value:.2f}"


def _difference(key: str, metrics: Mapping[str, Any]) -> str:
    value, exact = metrics.get(key), metrics["float"].get(key)
    if value is None or exact is None:
        return "-"
    return f"{value - exact:+.3f}" if key in _SHARES else f"{value - exact:+.2f}"


def _scores_section(metrics: Mapping[str, Any], record: RunRecord | None) -> Section:
    keys = [(key, title) for key, title in COLUMNS if key in metrics]
    titles = {key: title if key in _SHARES else f"{title}, %" for key, title in keys}
    name = "quantized" if metrics.get("quantized") else "float"
    if "float" not in metrics:
        rows = [[titles[key], _score(key, metrics[key])] for key, _ in keys]
        blocks: list[Block] = [Table("Scores", ["score", name], rows)]
    else:
        exact = metrics["float"]
        rows = [
            [
                titles[key],
                _score(key, exact.get(key)),
                _score(key, metrics[key]),
                _difference(key, metrics),
            ]
            for key, _ in keys
        ]
        blocks = [Table("Scores", ["score", "float", name, "change"], rows)]
        blocks.append(Plots("Drawings", [_scores_plot(metrics, keys), *_picture_plots(record)]))
    intro = (
        f"{_scored(metrics)} Mean IoU and agreement are from 0 to 1; agreement is the mean IoU of "
        "the masks with the float model's for the same boxes."
    )
    pairs = [
        (one.iou, one.float_iou, one.masks)
        for one in (() if record is None else record.scores)
        if one.iou is not None and one.float_iou is not None and one.masks
    ]
    if pairs:
        first, second, counts = zip(*pairs, strict=True)
        said = paired_difference(first, second, counts)
        intro += (
            f" Mean IoU against the float model, in points, with the interval of a paired "
            f"bootstrap over {said.pictures:,} pictures: {said}."
        )
    return Section("scores", "Scores", blocks, intro)


def _scored(metrics: Mapping[str, Any]) -> str:
    """What AP is of, how a mask gets its score, and who computed it."""
    by = f" by {metrics['evaluator']}" if "evaluator" in metrics else ""
    prompted = f", of masks that {metrics['prompts']} prompts" if "prompts" in metrics else ""
    told = f"AP and AR are in percent{by}{prompted}."
    prompting = metrics.get("asked", {}).get("prompting")
    if prompting is None:
        return told
    factor = " times the IoU that the model predicts"
    if prompting.get("keep_scores", False):  # an older version has not written it
        factor = ""
    elif not prompting["use_sam_iou"]:
        factor = " times the mean probability inside the mask"
    return f"{told} A mask's score is its prompt's{factor}."


def _scores_plot(metrics: Mapping[str, Any], keys: Sequence[tuple[str, str]]) -> Plot:
    exact = metrics["float"]
    both = [k for k, _ in keys if metrics.get(k) is not None and exact.get(k) is not None]
    titles = dict(keys)

    def percent(key: str, value: float) -> float:
        return 100 * value if key in _SHARES else value

    drawn = bars(
        [titles[key] for key in both],
        [
            ("float", FLOAT, [percent(key, exact[key]) for key in both]),
            ("quantized", QUANTIZED, [percent(key, metrics[key]) for key in both]),
        ],
        "%",
        "Scores of the float and of the quantized model in percent",
        numbers="{:.1f}",
    )
    return Plot(drawn, "Scores; mean IoU in percent too.")


def _picture_plots(record: RunRecord | None) -> list[Plot]:
    """How agreement and loss of IoU are spread over pictures."""
    if record is None:
        return []
    plots = []
    agreements = [one.agreement for one in record.scores if one.agreement is not None]
    if agreements:
        caption = f"Agreement with the float masks in each of {len(agreements):,} pictures."
        plots.append(_spread(agreements, 0, 1, "agreement", caption, THIRD))
    changes = [
        one.iou - one.float_iou
        for one in record.scores
        if one.iou is not None and one.float_iou is not None
    ]
    if changes:
        reach = max(0.05, *map(abs, changes))
        caption = (
            f"Change of the mean IoU with the truth in each of {len(changes):,} pictures: "
            f"{sum(change < 0 for change in changes):,} lose."
        )
        plots.append(_spread(changes, -reach, reach, "change of mean IoU", caption, QUANTIZED))
    return plots


def _spread(
    values: Sequence[float], low: float, high: float, label: str, caption: str, colour: str
) -> Plot:
    counts = [0.0] * _BINS
    for value in values:
        counts[min(_BINS - 1, int((value - low) / (high - low) * _BINS))] += 1
    figure, (one,) = axes(label, "pictures")
    histogram(one, low, high, counts, colour)
    whole_numbers(one)
    if low < 0:
        one.axvline(0, color=INK, linewidth=0.8)
    return Plot(svg(figure, caption), caption)


def _record_sections(record: RunRecord) -> list[Section]:
    sections = []
    if record.worst:
        compared = record.worst[0].reference is not None
        by = "agreement with the float masks" if compared else "IoU with the truth"
        limit = (
            f" Masks with a score below {record.threshold:g} are left out."
            if (record.threshold > 0)
            else ""
        )
        tells = (
            " The slider divides float (left) from quantized (right) masks; in the difference, red "
            "is in the float mask only, blue in the quantized one only, grey in both."
            if compared
            else ""
        )
        intro = (
            f"{len(record.worst)} of {len(record.scores):,} pictures, those with the lowest {by}, "
            f"the worst first; boxes are the prompts.{limit}{tells}"
        )
        sections.append(Section("pictures", "Pictures", [Pictures(record.worst)], intro))
    if record.distributions is not None:
        sections += [
            keys_section(record.distributions),
            softmax_section(record.distributions),
            channels_section(record.distributions),
        ]
    return sections


def _run_section(run: RunFolder) -> Section:
    metrics = run.metrics
    blocks: list[Block] = []
    asked = dict(metrics.get("asked", {}))
    facts = {
        **{k: metrics[k] for k in ("prompts", "seed", "device", "backend") if k in metrics},
        **asked,
        **metrics.get("versions", {}),
    }
    if facts:
        rows = [[name.replace("_", " "), _plain(value)] for name, value in facts.items()]
        blocks.append(Table("What was asked", ["setting", "value"], rows, texts=2))
    # "stages" in runs of before.
    phases = metrics.get("phases", metrics.get("stages", {}))
    if phases:
        rows = [
            [name, f"{took['seconds']:.1f}", f"{took['peak_memory_bytes'] / 2**30:.2f}"]
            for name, took in phases.items()
        ]
        blocks.append(Table("Phases", ["phase", "seconds", "peak memory, GiB"], rows))
    if metrics.get("audit"):
        blocks.append(Text("\n".join(metrics["audit"]["report"]), "Audit"))
    if run.scheme:
        blocks.append(Text(run.scheme, SCHEME))
    if run.log:
        left_out = len(run.log) - _LOG_LINES
        head = [f"({left_out} lines before)"] if left_out > 0 else []
        blocks.append(Text("\n".join([*head, *run.log[-_LOG_LINES:]]), "Log"))
    return Section("run", "Run", blocks)


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(one)}" for key, one in value.items())
    return "-" if value is None else str(value)
