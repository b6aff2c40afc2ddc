"""What a sweep computes: its trials, and before them what several trials share.

Shared are the boxes of detectors, the float model's masks and scores, and calibrations: trials that
differ in nothing but the reconstruction (seed, steps, probability of dropping, units) start from
one calibrated model. Each is computed once for a sweep, by one worker, and lies in its folder for
all workers and for whoever goes on with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ptq4sam.quantization.scheme import STUDY, Scheme
from ptq4sam.runs.calibration import order_seed
from ptq4sam.sweep.grid import Trial
from ptq4sam.sweep.settings import TrialSettings, digest, with_extensions

Kind = Literal["boxes", "calibration boxes", "float", "calibration", "trial"]

_WITHOUT_DETECTOR = ("ground-truth", "ground-truth:all")


@dataclass(frozen=True)
class Task:
    """A piece of work for one worker.

    Attributes:
        kind: which.
        key: identifies it among its kind.
        settings: of a trial that needs it.
        needs: keys of the shared work that must be done before.
        label: for people.
    """

    kind: Kind
    key: str
    settings: TrialSettings
    needs: tuple[str, ...] = ()
    label: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a task.

    Attributes:
        error: why it failed, in one line; None where it did not.
        metrics: of a trial.
        phases: seconds and memory of its phases.
        versions: of packages, and the machine.
        worker: who did it.
        log: what it logged.
    """

    error: str | None = None
    metrics: dict[str, Any] | None = None
    phases: dict[str, Any] | None = None
    versions: dict[str, str] | None = None
    worker: str = ""
    log: str = ""


@dataclass(frozen=True)
class Folder:
    """Where a sweep keeps its files."""

    path: Path

    @property
    def store(self) -> Path:
        """The records of trials."""
        return self.path / "sweep.sqlite"

    @property
    def description(self) -> Path:
        """What the trials are."""
        return self.path / "sweep.json"

    @property
    def scenes(self) -> Path:
        """Generated scenes."""
        return self.path / "scenes"

    @property
    def boxes(self) -> Path:
        """Detections, as `ptq4sam.prompts.cached` keeps them."""
        return self.path / "shared" / "boxes"

    def result(self, kind: Kind, key: str) -> Path:
        """The file that a finished piece of shared work has written."""
        ending = "safetensors" if kind == "calibration" else "json"
        return self.path / "shared" / f"{kind.replace(' ', '-')}-{key}.{ending}"

    def trial(self, key: str) -> Path:
        """Work directory of a trial that has not ended."""
        return self.path / "unfinished" / key


def plan(
    trials: Sequence[Trial], folder: Folder, floats: Iterable[TrialSettings] = ()
) -> list[Task]:
    """What must be done for trials that have no record yet, each behind what it needs.

    Shared work that is done already, in this run or one before, is left out.

    Args:
        trials: those without a record.
        folder: where what is shared lies.
        floats: settings whose float model is scored, whether a trial needs it or not.
    """
    work = [task for settings in floats for task in _float_work(settings)]
    for trial in trials:
        shared = list(_shared(trial, trials))
        needs = tuple(task.key for task in shared)
        work += [*shared, Task("trial", trial.key, trial.settings, needs, trial.name)]
    tasks: dict[str, Task] = {}
    for task in work:
        if task.kind == "trial" or not folder.result(task.kind, task.key).exists():
            tasks.setdefault(task.key, task)
    return [
        replace(task, needs=tuple(key for key in task.needs if key in tasks))
        for task in tasks.values()
    ]


def float_key(settings: TrialSettings) -> str:
    """Identifies the float model's results."""
    part = settings.part("model", "checkpoint", "data", "prompts", "prompting", "device")
    return digest(["float", part, settings.evaluated])


def calibration_key(settings: TrialSettings) -> str:
    """Identifies a calibration."""
    part = settings.part("model", "checkpoint", "quantize_encoder", "calibration", "device")
    scheme = {**calibration_scheme(settings.scheme).to_dict(), **with_extensions()}
    return digest(["calibration", part, _boxes_part(settings), scheme, _order(settings)])


def calibration_scheme(scheme: Scheme) -> Scheme:
    """The part of a scheme that calibration depends on: all but the reconstruction.

    A study has operators of its own, published defects come after calibration.
    """
    compat = STUDY if scheme.compat == STUDY else "faithful"
    return replace(scheme, recon=None, compat=compat)


def _order(settings: TrialSettings) -> int | None:
    return order_seed(settings.scheme, settings.seed)


def _boxes_part(settings: TrialSettings) -> list[Any]:
    return [settings.boxes_to_calibrate, settings.part("prompting")]


def _float_work(settings: TrialSettings) -> Iterator[Task]:
    """What scores the float model, each behind its own needs."""
    needs: list[str] = []
    if settings.prompts not in _WITHOUT_DETECTOR:
        part = settings.part("prompts", "data", "device")
        key = digest(["boxes", part, settings.evaluated])
        needs.append(key)
        yield Task("boxes", key, settings, label=f"boxes of {settings.prompts}")
    label = f"float {settings.model}"
    yield Task("float", float_key(settings), settings, tuple(needs), label)


def _shared(trial: Trial, trials: Iterable[Trial]) -> Iterator[Task]:
    """What a trial needs, each behind its own needs."""
    settings = trial.settings
    yield from _float_work(settings)
    needs: list[str] = []
    if settings.boxes_to_calibrate not in _WITHOUT_DETECTOR:
        # Once for the trial that calibrates on most pictures.
        alike = [
            other.settings for other in trials if _boxes_of(other.settings) == _boxes_of(settings)
        ]
        largest = max(alike, key=lambda other: other.scheme.calibrate)
        key = digest([*_boxes_of(settings), largest.scheme.calibrate])
        needs.append(key)
        label = f"calibration boxes of {settings.boxes_to_calibrate}"
        yield Task("calibration boxes", key, largest, label=label)
    label = f"calibration of {settings.model}"
    yield Task("calibration", calibration_key(settings), settings, tuple(needs), label)


def _boxes_of(settings: TrialSettings) -> list[Any]:
    part = settings.part("calibration", "device")
    return ["calibration boxes", part, _boxes_part(settings), _order(settings)]
