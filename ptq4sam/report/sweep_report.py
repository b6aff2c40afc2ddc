"""The report of a sweep."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ptq4sam.report.figures import (
    FLOAT,
    INK,
    QUANTIZED,
    THIRD,
    axes,
    bars,
    legend_above,
    svg,
)
from ptq4sam.report.page import (
    Banner,
    Block,
    Page,
    Plot,
    Plots,
    Section,
    Table,
    Text,
    Tile,
)
from ptq4sam.sizes import format_seconds
from ptq4sam.sweep.description import read_description
from ptq4sam.sweep.ended import told_of_others
from ptq4sam.sweep.grid import Sweep, short, shown
from ptq4sam.sweep.store import read_records
from ptq4sam.sweep.summary import Row, float_lines, rows, table, table_over_seeds
from ptq4sam.sweep.tasks import Folder

_SEED = "seed"
_DRAWN = (("mean_iou", "mean IoU"), ("AP", "mask AP, %"), ("agreement", "agreement"))
_COLOURS = (FLOAT, QUANTIZED, THIRD, "#9b6fd0", "#c9a227", "#d0597b", "#5f7f8f", "#8a8a2f")
_CURVE_FROM = 4
"""Values of a numeric axis from which on it is drawn as a curve."""
_MOST_GROUPS = 16


@dataclass(frozen=True)
class _Mean:
    """Of a score over seeds."""

    mean: float
    spread: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> _Mean:
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        return cls(statistics.fmean(values), spread, len(values))


Combination = tuple[str, ...]
"""Values of all axes but the seed, as shown; "-" where a trial has none."""


def sweep_page(folder: Folder) -> Page:
    """A sweep's trials, as far as they have ended.

    Raises:
        DataError: what the trials are is not known, or damaged.
        StoreError: the records are damaged.
    """
    sweep = read_description(folder.description)
    records = read_records(folder.store)
    found = rows(sweep, records)
    done = [row for row in found if row.status == "done"]
    sections: list[Section] = []
    if done:
        sections.append(_axes_section(sweep, done))
    sections += [_trials_section(sweep, found), _machine_section(found)]
    return Page(
        f"Sweep {sweep.name}",
        f"Report of {folder.path}",
        sections,
        _tiles(found),
        _banners(found, told_of_others(sweep.trials, records)),
    )


def _banners(found: Sequence[Row], others: str) -> list[Banner]:
    """What keeps the sweep from being whole; `others` says which trials no longer count."""
    count = {status: sum(row.status == status for row in found) for status in ("open", "failed")}
    banners = []
    if count["open"]:
        banners.append(
            Banner(
                f"This sweep has not ended: {count['open']} of {len(found)} trials are open. The "
                "same command goes on with it."
            )
        )
    if others:
        banners.append(Banner(f"{others}."))
    if count["failed"]:
        banners.append(
            Banner(
                f"{count['failed']} of {len(found)} trials failed; their errors are in the table "
                "of trials. Start the sweep again, told to retry failed trials."
            )
        )
    return banners


def _tiles(found: Sequence[Row]) -> list[Tile]:
    done = [row for row in found if row.status == "done"]
    tiles = [Tile("trials done", f"{len(done)} of {len(found)}")]
    for key, title in _DRAWN[:2]:
        scored = [(value, row) for row in done if (value := row.metric(key)) is not None]
        if not scored:
            continue
        best, row = max(scored, key=lambda pair: pair[0])
        note = f"best, of {row.trial.name or 'the only trial'}"
        tiles.append(Tile(title, _number(key, best), note))
        exact = _float_scores(done, key)
        if len(exact) == 1:
            tiles.append(Tile(f"{title}, float", _number(key, exact[0])))
    seconds = sum(row.record.seconds for row in found if row.record is not None)
    tiles.append(Tile("time of all trials", format_seconds(seconds)))
    return tiles


def _number(key: str, value: float) -> str:
    return f"{value:.2f}" if key == "AP" else f"{value:.3f}"


def _float_scores(done: Sequence[Row], key: str) -> list[float]:
    """Different scores of the float models."""
    records = [row.record for row in done if row.record is not None]
    values = (record.metrics.get("float", {}).get(key) for record in records)
    return sorted({float(value) for value in values if value is not None})


def _axes_section(sweep: Sweep, done: Sequence[Row]) -> Section:
    varied = [axis for axis in sweep.axes if axis != _SEED]
    seeds = _SEED in sweep.axes
    spread = " and its standard deviation over seeds" if seeds else ""
    intro = f"Each bar or mark is a score's mean{spread}, over all trials that have ended."
    blocks: list[Block] = []
    for key, title in _DRAWN:
        means = _means(varied, done, key)
        if not means:
            continue
        exact = _float_scores(done, key)
        line = exact[0] if len(exact) == 1 else None
        plots = [_axis_plot(varied, axis, means, key, title, line) for axis in varied]
        if not varied:
            plots = [_seeds_plot(done, key, title)]
        blocks.append(Plots(title, plots, open=key != "agreement"))
    averaged = table_over_seeds(sweep, done)
    if averaged:
        change = "change against float: percentage points of mean IoU"
        caption = f"Mean ± standard deviation over seeds; {change}"
        head, *lines = averaged
        blocks.append(Table(caption, head, lines, texts=max(1, len(varied))))
    return Section("axes", "What varies", blocks, intro)


def _shown(value: object) -> str:
    """A value as drawings name it: of a scheme's file its name."""
    text = shown(value)
    return Path(text).stem if text.endswith(".yaml") else text


def _means(varied: Sequence[str], done: Sequence[Row], key: str) -> dict[Combination, _Mean]:
    groups: dict[Combination, list[float]] = {}
    for row in done:
        value = row.metric(key)
        if value is not None:
            values = row.trial.values
            combination = tuple(_shown(values[a]) if a in values else "-" for a in varied)
            groups.setdefault(combination, []).append(value)
    return {combination: _Mean.of(values) for combination, values in groups.items()}


def _axis_plot(
    varied: Sequence[str],
    axis: str,
    means: Mapping[Combination, _Mean],
    key: str,
    title: str,
    exact: float | None,
) -> Plot:
    """One axis against all others: its values side by side, or along a curve if they are many."""
    place = varied.index(axis)
    values = list(dict.fromkeys(combination[place] for combination in means))
    others = list(dict.fromkeys(_without(combination, place) for combination in means))
    label = f"{title} by {short(axis)}"
    told = "" if exact is None else f"; float: {_number(key, exact)}"
    if len(values) >= _CURVE_FROM and all(map(_is_number, values)):
        drawn = _curves(varied, place, means, title, label, exact)
        return Plot(drawn, f"{label}{told}{'' if exact is None else ' (dashed)'}.")
    if others == [()]:
        series = [(short(axis), QUANTIZED, [means[(value,)].mean for value in values])]
        errors = [[means[(value,)].spread for value in values]]
        names = list(values)
    else:
        groups = others[:_MOST_GROUPS]
        names = [_named(varied, place, other) for other in groups]
        series, errors = [], []
        for index, value in enumerate(values):
            found = [means.get(_with(other, place, value)) for other in groups]
            heights = [float("nan") if one is None else one.mean for one in found]
            colour = _COLOURS[index % len(_COLOURS)]
            series.append((f"{short(axis)} {value}", colour, heights))
            errors.append([0.0 if one is None else one.spread for one in found])
        if len(others) > len(groups):
            told += f"; {len(groups)} of {len(others)} combinations of the others"
    form = "{:.1f}" if key == "AP" else "{:.3f}"
    repeated = any(mean.count > 1 for mean in means.values())
    drawn = bars(names, series, title, label, errors if repeated else None, numbers=form)
    return Plot(drawn, f"{label}{told}.")


def _curves(
    varied: Sequence[str],
    place: int,
    means: Mapping[Combination, _Mean],
    title: str,
    label: str,
    exact: float | None,
) -> str:
    figure, (one,) = axes(short(varied[place]), title, height=2.7)
    others = list(dict.fromkeys(_without(combination, place) for combination in means))
    for index, other in enumerate(others[: len(_COLOURS)]):
        marks = sorted(
            (float(combination[place]), mean)
            for combination, mean in means.items()
            if _without(combination, place) == other and _is_number(combination[place])
        )
        one.errorbar(
            [x for x, _ in marks],
            [mean.mean for _, mean in marks],
            [mean.spread for _, mean in marks],
            color=_COLOURS[index],
            marker="o",
            markersize=4,
            capsize=2,
            linewidth=1.4,
            label=_named(varied, place, other) or None,
        )
    numbers = [float(combination[place]) for combination in means if _is_number(combination[place])]
    if min(numbers) > 0 and max(numbers) / min(numbers) > 20:
        one.set_xscale("log")
    if exact is not None:
        one.axhline(exact, color=INK, linewidth=0.9, linestyle=(0, (3, 2)))
    if others != [()]:
        legend_above(figure, [_named(varied, place, other) for other in others[: len(_COLOURS)]])
    return svg(figure, label)


def _seeds_plot(done: Sequence[Row], key: str, title: str) -> Plot:
    """Where nothing but the seed varies."""
    scored = [(row, value) for row in done if (value := row.metric(key)) is not None]
    names = [row.trial.name or "the only trial" for row, _ in scored]
    values = [value for _, value in scored]
    form = "{:.1f}" if key == "AP" else "{:.3f}"
    drawn = bars(names, [(title, QUANTIZED, values)], title, f"{title} by trial", numbers=form)
    return Plot(drawn, f"{title} by trial.")


def _without(combination: Combination, place: int) -> Combination:
    return (*combination[:place], *combination[place + 1 :])


def _with(other: Combination, place: int, value: str) -> Combination:
    return (*other[:place], value, *other[place:])


def _named(varied: Sequence[str], place: int, other: Combination) -> str:
    names = [short(axis) for axis in _without(tuple(varied), place)]
    return ", ".join(f"{name} {value}" for name, value in zip(names, other, strict=True))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _trials_section(sweep: Sweep, found: Sequence[Row]) -> Section:
    head, *lines = table(sweep, found)
    blocks: list[Block] = [Text(line) for line in float_lines(found)]
    blocks.append(
        Table(
            "AP and its parts in percent, mean IoU and agreement from 0 to 1",
            head,
            lines,
            texts=max(1, len(sweep.axes)),
        )
    )
    for row in found:
        if row.record is not None and row.status == "failed":
            blocks.append(Text(row.record.log, f"Log of {row.trial.name}, which failed"))
    return Section("trials", "Trials", blocks)


def _machine_section(found: Sequence[Row]) -> Section:
    records = [row.record for row in found if row.record is not None]
    used = dict.fromkeys(
        ", ".join(f"{name} {version}" for name, version in sorted(record.versions.items()))
        for record in records
        if record.versions
    )
    blocks: list[Block] = [Text(f"Measured with {one}.") for one in used]
    if records:
        blocks.append(Text(records[0].scheme, f"Scheme of {records[0].name or 'the first trial'}"))
    return Section("measured", "How it was measured", blocks)
