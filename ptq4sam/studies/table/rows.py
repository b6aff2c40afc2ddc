"""Cells of the table, and what became of each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ptq4sam.evaluation.bootstrap import paired_difference
from ptq4sam.studies.table.published import FLOAT, METHODS, Published
from ptq4sam.sweep.float_results import FloatResults
from ptq4sam.sweep.grid import Sweep, Trial
from ptq4sam.sweep.scheduler import State
from ptq4sam.sweep.settings import TrialSettings
from ptq4sam.sweep.store import TrialRecord
from ptq4sam.sweep.tasks import Folder, Outcome, float_key

Status = Literal["done", "failed", "open", "missing"]
Metric = Literal["AP", "mean_iou"]

_BY_SIZE: dict[Metric, tuple[str, ...]] = {
    "AP": ("APl", "APm", "APs"),
    "mean_iou": ("mean_iou_large", "mean_iou_medium", "mean_iou_small"),
}


@dataclass(frozen=True)
class MissingInput:
    """Something that a cell needs and that is not there.

    Attributes:
        what: the file or library.
        asset: its name for `ptq4sam download`, or None.
        remedy: how else it can be had.
    """

    what: str
    asset: str | None = None
    remedy: str = ""

    def __str__(self) -> str:
        """Its shortest name."""
        return self.asset or self.what


@dataclass(frozen=True)
class Cell:
    """One cell of the table.

    Attributes:
        detector: its name among the filters.
        boxes: detector and data for people.
        model: the SAM.
        bits: of weights and activations; None for the float model.
        method: a key of METHODS.
        settings: what runs; of a float cell those of any trial with the same float model.
        published: what papers say.
        missing: what it needs and is not there.
        title: of the method, where METHODS does not have it.
        metric: what is measured.
        by_size: whether that of large, medium and small objects is shown too.
        saved: megabytes against float16, as the study of its table counts them.
    """

    detector: str
    boxes: str
    model: str
    bits: int | None
    method: str
    settings: TrialSettings
    published: Published
    missing: tuple[MissingInput, ...] = ()
    title: str = ""
    metric: Metric = "AP"
    by_size: bool = False
    saved: float | None = None

    @property
    def method_title(self) -> str:
        """The method for people."""
        return self.title or METHODS[self.method]

    @property
    def width(self) -> str:
        """Bits as tables show them."""
        return "float" if self.bits is None else f"W{self.bits}A{self.bits}"

    @property
    def name(self) -> str:
        """In one line."""
        parts = (self.detector, self.model, self.method, self.width)
        return " ".join(dict.fromkeys(parts))

    @property
    def lacks(self) -> str:
        """What is missing, in one line."""
        return ", ".join(dict.fromkeys(map(str, self.missing)))

    def trial(self) -> Trial:
        """As a sweep has it."""
        values = {
            "detector": self.detector,
            "model": self.model,
            "bits": self.width,
            "method": self.method,
        }
        return Trial(values, self.settings, self.settings.key())


@dataclass(frozen=True)
class Row:
    """A cell and what became of it.

    Attributes:
        cell: what was asked.
        status: "done", "failed", "open" (not run yet) or "missing".
        score: the cell's metric in percent.
        float_score: that of the float model.
        seconds: that it took.
        problem: the error, or what is missing.
        versions: of packages, and the machine.
        by_picture: mean IoU with the float model's masks, and how many, of each picture by its id.
        sizes: the metric of large, medium and small objects, where the cell asks for them; None of
            a size that nothing annotated has.
    """

    cell: Cell
    status: Status
    score: float | None = None
    float_score: float | None = None
    seconds: float | None = None
    problem: str = ""
    versions: str = ""
    by_picture: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    sizes: tuple[float | None, ...] = ()

    @property
    def change(self) -> float | None:
        """Against the float model, in percentage points; None of the float model itself."""
        if self.cell.bits is None or self.score is None or self.float_score is None:
            return None
        return self.score - self.float_score

    @property
    def difference(self) -> float | None:
        """Against the corrected figure, else the published one, in percentage points."""
        reference = self.cell.published.comparable
        return None if self.score is None or reference is None else self.score - reference


def sweep_of(name: str, cells: Iterable[Cell]) -> tuple[Sweep, list[TrialSettings]]:
    """The trials of the cells that can run, and the settings of their float models."""
    present = [cell for cell in cells if not cell.missing]
    trials = {cell.settings.key(): cell.trial() for cell in present if cell.bits is not None}
    floats = [cell.settings for cell in present if cell.bits is None]
    return Sweep(name, tuple(trials.values())), floats


def rows(cells: Iterable[Cell], state: State, folder: Folder) -> Iterator[Row]:
    """What became of the cells.

    Args:
        cells: in the order of the table.
        state: the sweep's.
        folder: its files, among them the float models' results.
    """
    for cell in cells:
        if cell.missing:
            yield Row(cell, "missing", problem=cell.lacks)
        elif cell.bits is None:
            yield _float_row(cell, state.failed, folder)
        else:
            yield _row(cell, state.records.get(cell.settings.key()))


def _row(cell: Cell, record: TrialRecord | None) -> Row:
    if record is None:
        return Row(cell, "open")
    versions = ", ".join(f"{name} {version}" for name, version in sorted(record.versions.items()))
    if record.status != "done":
        return Row(cell, "failed", seconds=record.seconds, problem=record.error, versions=versions)
    score, sizes = _scores(cell, record.metrics)
    float_score, _ = _scores(cell, record.metrics.get(FLOAT, {}))
    by_picture = {str(key): pair for key, pair in record.metrics.get("by_picture", {}).items()}
    return Row(cell, "done", score, float_score, record.seconds, "", versions, by_picture, sizes)


def _scores(
    cell: Cell, metrics: Mapping[str, Any]
) -> tuple[float | None, tuple[float | None, ...]]:
    """A cell's metric in percent, and the same by size where it asks for that."""

    def percent(name: str) -> float | None:
        value = metrics.get(name)
        if value is None:
            return None
        return 100 * float(value) if cell.metric == "mean_iou" else float(value)

    sizes = tuple(map(percent, _BY_SIZE[cell.metric])) if cell.by_size else ()
    return percent(cell.metric), sizes


def comparisons(found: Sequence[Row]) -> Iterator[str]:
    """Of each method against the one above it: whether they agree differently with the float model.

    By the same pictures; those of rows that have no scores of pictures are left out.
    """
    above: dict[str, Row] = {}
    for row in found:
        block = f"{row.cell.boxes} {row.cell.model} {row.cell.width}"
        if not row.by_picture:
            continue
        if block in above:
            other = above[block]
            both = [key for key in row.by_picture if key in other.by_picture]
            means = [[one.by_picture[key][0] for key in both] for one in (row, other)]
            counts = [row.by_picture[key][1] for key in both]
            if both:
                names = (one.cell.method_title for one in (row, other))
                said = paired_difference(means[0], means[1], counts)
                yield f"{block}, agreement of {' against '.join(names)}: {said}."
        above[block] = row


def _float_row(cell: Cell, failed: Mapping[str, Outcome], folder: Folder) -> Row:
    key = float_key(cell.settings)
    path = folder.result("float", key)
    if path.exists():
        score, sizes = _scores(cell, FloatResults.load(path).metrics)
        return Row(cell, "done", score, score, sizes=sizes)
    return (
        Row(cell, "failed", problem=failed[key].error or "") if key in failed else Row(cell, "open")
    )
