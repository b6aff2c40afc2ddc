"""A worker: does one task after the other and keeps models and data sets between them."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ptq4sam.errors import Ptq4samError, gpu_memory_advice, in_one_line, is_out_of_memory
from ptq4sam.evaluation.evaluate import evaluate_sam
from ptq4sam.extensions import fault_of_extension, load_extensions
from ptq4sam.files import write_json
from ptq4sam.model.calibrated import CalibratedState
from ptq4sam.model.calibration import calibrate
from ptq4sam.model.insertion import insert_quantizers
from ptq4sam.numerics import reproducible
from ptq4sam.progress import silent
from ptq4sam.runs.auditing import audit_run, require_passed
from ptq4sam.runs.context import Opened
from ptq4sam.runs.parts import Parts
from ptq4sam.runs.phases import Phases
from ptq4sam.runs.quantizing import Quantizing
from ptq4sam.runs.reproducibility import fix_seeds, versions
from ptq4sam.runs.run_log import package_log_to
from ptq4sam.sweep.float_results import Agreement, FloatResults
from ptq4sam.sweep.settings import TrialSettings
from ptq4sam.sweep.tasks import (
    Folder,
    Outcome,
    Task,
    calibration_key,
    calibration_scheme,
    float_key,
)

_log = logging.getLogger(__name__)

_OPEN = 4
"""Models, data sets and the like that a worker keeps of each kind."""


@dataclass
class Worker:
    """Does tasks in its process.

    Attributes:
        folder: the sweep's files.
        workers: how many share this machine: each takes its part of the free memory.
        name: for the records.
        threads: of torch; None for torch's own choice.
    """

    folder: Folder
    workers: int = 1
    name: str = "worker"
    threads: int | None = None
    _opened: Opened = field(default_factory=lambda: Opened(_OPEN))

    def __post_init__(self) -> None:
        # Before the first task arrives: its settings may be of their classes.
        load_extensions()
        if self.threads is not None:
            torch.set_num_threads(self.threads)

    @reproducible()
    def do(self, task: Task) -> Outcome:
        """Do a task; whatever goes wrong is in the outcome."""
        phases = Phases()
        work: dict[str, Callable[[Task, Parts], dict[str, Any] | None]] = {
            "boxes": self._boxes,
            "calibration boxes": self._calibration_boxes,
            "float": self._float,
            "calibration": self._calibration,
            "trial": self._trial,
        }
        metrics, problem = None, None
        with _logged() as log:
            try:
                metrics = work[task.kind](task, self._parts(task, phases))
            except Exception as error:
                problem = _in_one_line(error)
                level = logging.WARNING if isinstance(error, Ptq4samError) else logging.ERROR
                _log.log(level, "%s failed: %s", task.kind, problem, exc_info=True)
        if problem is not None:
            self._let_go()
        return Outcome(problem, metrics, phases.to_dict(), _versions(), self.name, log.getvalue())

    def _parts(self, task: Task, phases: Phases) -> Parts:
        """What a run of the task's settings is made of."""
        folder = self.folder
        settings = task.settings.run(folder.trial(task.key), folder.boxes, folder.scenes)
        shared = {"opened": self._opened, "sharers": self.workers}
        return Parts.of(settings, silent, phases=phases, **shared)

    def _trial(self, task: Task, parts: Parts) -> dict[str, Any]:
        settings, phases = parts.context.settings, parts.context.phases
        fix_seeds(settings.seed)
        dataset, source = parts.pictures()
        sam = parts.models.float_sam()
        with phases.phase("shared results"):
            reference = self._float_results(task.settings)
            calibrated = self._calibrated(task.settings)
        scheme = task.settings.scheme
        # Methods may look at the pictures after calibration too.
        looked_at = scheme.recon is not None or scheme.method_settings
        items = parts.inputs.calibration(sam) if looked_at else ()
        with phases.phase("quantize"):
            quantized = Quantizing(
                parts.context, sam, items, scheme, calibrated, restart=True
            ).run()
        report = audit_run(phases, quantized)
        require_passed(report, quantized)
        agreement = Agreement(reference)
        with phases.phase("evaluate"):
            evaluation = evaluate_sam(
                quantized, dataset, source, settings.prompting, on_picture=agreement
            )
        # Nothing can be lost any more; the records of trials are the parent's.
        shutil.rmtree(settings.work_dir, ignore_errors=True)
        return {
            **evaluation.metrics,
            "agreement": agreement.mean,
            "by_picture": agreement.pictures,
            "pictures": evaluation.pictures,
            "masks": evaluation.masks,
            "folded": quantized.folded,
            "changed_by": quantized.applied,
            "audit": report.passed,
            "float": reference.metrics,
        }

    def _boxes(self, task: Task, parts: Parts) -> None:
        dataset, source = parts.pictures()
        with parts.context.phases.phase("boxes"):
            for record in dataset.images:
                source.prompts(record, dataset.load(record))
        self._mark(task, {"pictures": len(dataset.images)})

    def _calibration_boxes(self, task: Task, parts: Parts) -> None:
        items = parts.inputs.calibration(parts.models.float_sam())
        self._mark(task, {"pictures": len(items)})

    def _mark(self, task: Task, content: dict[str, Any]) -> None:
        write_json(content, self.folder.result(task.kind, task.key))

    def _float(self, task: Task, parts: Parts) -> None:
        dataset, source = parts.pictures()
        sam = parts.models.float_sam()
        with parts.context.phases.phase("evaluate"):
            evaluation = evaluate_sam(sam, dataset, source, task.settings.prompting)
        FloatResults.of(evaluation).save(self.folder.result("float", task.key))

    def _calibration(self, task: Task, parts: Parts) -> None:
        settings = task.settings
        sam = parts.models.float_sam()
        items = parts.inputs.calibration(sam)
        with parts.context.phases.phase("calibrate"):
            scheme = calibration_scheme(settings.scheme)
            quantized = insert_quantizers(sam, scheme, settings.quantize_encoder)
            calibrate(quantized, items)
        CalibratedState.of(quantized, sam).save(self.folder.result("calibration", task.key))

    def _float_results(self, settings: TrialSettings) -> FloatResults:
        path = self.folder.result("float", float_key(settings))
        return self._opened.get("float", path, lambda: FloatResults.load(path))

    def _calibrated(self, settings: TrialSettings) -> CalibratedState:
        path = self.folder.result("calibration", calibration_key(settings))
        return self._opened.get("calibrated", path, lambda: CalibratedState.load(path))

    def _let_go(self) -> None:
        """Free all memory after a failure: it may have been too little."""
        self._opened.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _versions() -> dict[str, str]:
    return {**versions(), "machine": f"{platform.node()} {platform.machine()}"}


def _in_one_line(error: Exception) -> str:
    """An error as a record has it."""
    if isinstance(error, OSError):
        return in_one_line(error)
    what = " ".join(str(error).split())
    if is_out_of_memory(error):
        told = what[:200] or "in Python"
        return f"out of memory ({told}): calibrate on fewer pictures{gpu_memory_advice(error)}"
    if isinstance(error, Ptq4samError):
        return what
    return fault_of_extension(error) or f"{type(error).__name__}: {what[:500]}"


@contextlib.contextmanager
def _logged() -> Iterator[io.StringIO]:
    """What the package logs within the `with` block, as text."""
    text = io.StringIO()
    with package_log_to(logging.StreamHandler(text), logging.INFO):
        yield text
