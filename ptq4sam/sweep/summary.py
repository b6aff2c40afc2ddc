"""The trials of a sweep as tables: for people, Markdown, CSV."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptq4sam.evaluation.overlap import MEAN_IOU
from ptq4sam.files import write_text
from ptq4sam.runs.summary import COLUMNS
from ptq4sam.sweep.grid import Sweep, Trial, short, shown
from ptq4sam.sweep.store import TrialRecord

_SEED = "seed"
_CHANGE = "change"
"""Of the score that counts, against the float model's: mean IoU in percentage points, else AP."""

_DECIDING = {MEAN_IOU: "IoU", "AP": "AP"}
"""Scores that may count, the first one first, and how the column of their change names them."""

_PARTS_OF_AP = ("AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf", "AR")


@dataclass(frozen=True)
class Row:
    """One trial.

    Attributes:
        trial: what was asked.
        record: what came of it; None where it has not ended.
    """

    trial: Trial
    record: TrialRecord | None

    @property
    def status(self) -> str:
        """Of its record: "done" or "failed"; "open" without one."""
        return "open" if self.record is None else self.record.status

    def metric(self, name: str) -> float | None:
        """A score, or None where there is none."""
        if self.record is None:
            return None
        if name == _CHANGE:
            return _change(self.record.metrics)
        value = self.record.metrics.get(name)
        return None if value is None else float(value)


def rows(sweep: Sweep, records: Mapping[str, TrialRecord]) -> list[Row]:
    """The trials in their order, with what is known of them."""
    return [Row(trial, records.get(trial.key)) for trial in sweep.trials]


def metrics_of(found: Iterable[Row], brief: bool = False) -> list[tuple[str, str]]:
    """Names and titles of the scores that some trial has, and the change against float.

    Args:
        found: the trials.
        brief: without the parts of AP, for which a terminal has no room.
    """
    found = list(found)
    scores = [column for column in COLUMNS if not (brief and column[0] in _PARTS_OF_AP)]
    changed = {_changed(row.record.metrics) for row in found if row.record is not None}
    of = next((title for key, title in _DECIDING.items() if key in changed), "")
    columns = [*scores, (_CHANGE, f"{of} change")]
    return [
        (key, title) for key, title in columns if any(row.metric(key) is not None for row in found)
    ]


def float_lines(found: Iterable[Row]) -> list[str]:
    """The scores of the float models, a line each."""
    lines: dict[str, None] = {}
    for row in found:
        if row.record is None or "float" not in row.record.metrics:
            continue
        scores = row.record.metrics["float"]
        known = ((title, scores.get(key)) for key, title in COLUMNS)
        values = [f"{title} {_number(value)}" for title, value in known if value is not None]
        lines[f"float {row.trial.settings.model}: {', '.join(values)}"] = None
    return list(lines)


def table(sweep: Sweep, found: Sequence[Row], brief: bool = False) -> list[list[str]]:
    """Titles, and the cells of every trial."""
    scores = metrics_of(found, brief)
    titles = [*map(short, sweep.axes), *(title for _, title in scores), "seconds", "status"]
    lines = [titles]
    for row in found:
        values = [shown(row.trial.values[a]) if a in row.trial.values else "" for a in sweep.axes]
        numbers = [_number(row.metric(key), signed=key == _CHANGE) for key, _ in scores]
        seconds = "" if row.record is None else f"{row.record.seconds:.1f}"
        problem = f": {row.record.error}" if row.record is not None and row.record.error else ""
        lines.append([*values, *numbers, seconds, row.status + problem])
    return lines


def table_over_seeds(sweep: Sweep, found: Sequence[Row], brief: bool = False) -> list[list[str]]:
    """Means and standard deviations over seeds; empty where there is only one."""
    axes = [axis for axis in sweep.axes if axis != _SEED]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in found:
        if row.status == "done":
            values = tuple(
                shown(row.trial.values[a]) if a in row.trial.values else "" for a in axes
            )
            groups.setdefault(values, []).append(row)
    if _SEED not in sweep.axes or all(len(group) < 2 for group in groups.values()):
        return []
    scores = metrics_of(found, brief)
    lines = [[*map(short, axes), "seeds", *(title for _, title in scores)]]
    for values, group in groups.items():
        cells = [spread([row.metric(key) for row in group], key == _CHANGE) for key, _ in scores]
        lines.append([*values, str(len(group)), *cells])
    return lines


def markdown(sweep: Sweep, found: Sequence[Row]) -> str:
    """The page that lies beside the records."""
    done = sum(row.status == "done" for row in found)
    parts = [f"# Sweep {sweep.name}", "", f"{done} of {len(found)} trials done."]
    parts += float_lines(found)
    parts += [
        "",
        "Change is against the float model: mean IoU in percentage points, or AP without it.",
    ]
    averaged = table_over_seeds(sweep, found)
    if averaged:
        parts += ["", "## Mean and standard deviation over seeds", "", *_markdown_table(averaged)]
    parts += ["", "## Trials", "", *_markdown_table(table(sweep, found))]
    versions = {
        ", ".join(f"{name} {version}" for name, version in sorted(row.record.versions.items()))
        for row in found
        if row.record is not None and row.record.versions
    }
    return "\n".join([*parts, "", *(f"Measured with {used}." for used in sorted(versions)), ""])


def csv_text(sweep: Sweep, found: Sequence[Row]) -> str:
    """Every trial with all its numbers, for programs."""
    scores = metrics_of(found)
    phases = list(dict.fromkeys(name for row in found if row.record for name in row.record.phases))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    times = [f"{name} seconds" for name in phases]
    writer.writerow(
        ["key", *sweep.axes, "status", *(key for key, _ in scores), "seconds", *times, "error"]
    )
    for row in found:
        record = row.record
        values = [row.trial.values.get(axis, "") for axis in sweep.axes]
        numbers = [row.metric(key) for key, _ in scores]
        ended: list[object] = [None] * (len(phases) + 2)
        if record is not None:
            spent = (record.phases.get(name, {}).get("seconds") for name in phases)
            ended = [record.seconds, *spent, record.error]
        writer.writerow([row.trial.key, *values, row.status, *numbers, *ended])
    return text.getvalue()


def write(sweep: Sweep, found: Sequence[Row], folder: Path) -> list[Path]:
    """Write Markdown and CSV; returns the files."""
    written = []
    for name, content in (
        ("sweep.md", markdown(sweep, found)),
        ("sweep.csv", csv_text(sweep, found)),
    ):
        write_text(content, folder / name)
        written.append(folder / name)
    return written


def _changed(metrics: Mapping[str, Any]) -> str | None:
    """The score that counts: the first that is known of both models."""
    reference = metrics.get("float", {})
    known = (key for key in _DECIDING if None not in (metrics.get(key), reference.get(key)))
    return next(known, None)


def _change(metrics: Mapping[str, Any]) -> float | None:
    key = _changed(metrics)
    if key is None:
        return None
    factor = 100 if key == MEAN_IOU else 1
    return factor * (float(metrics[key]) - float(metrics["float"][key]))


def _number(value: float | None, signed: bool = False) -> str:
    if value is None:
        return ""
    digits = 3 if abs(value) <= 1 and not signed else 1
    return f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"


def spread(values: Sequence[float | None], signed: bool) -> str:
    """Mean and standard deviation of a score over seeds; of one seed, its number alone.

    Args:
        values: one a seed; None where there is none.
        signed: a change.
    """
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = statistics.fmean(known)
    if len(known) == 1:
        return _number(mean, signed)
    digits = 3 if abs(mean) <= 1 and not signed else 1
    return f"{_number(mean, signed)} ± {statistics.stdev(known):.{digits}f}"


def _markdown_table(lines: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(lines[0]), "|" + "---|" * len(lines[0]), *map(line, lines[1:])]
