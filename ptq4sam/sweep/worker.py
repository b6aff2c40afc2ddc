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
from pathlib import Path
from typing import Any, TypeVar

import torch

from ptq4sam.data import ImageSet
from ptq4sam.errors import (
    CalibrationError,
    ConfigError,
    Ptq4samError,
    gpu_memory_advice,
    in_one_line,
    is_out_of_memory,
)
from ptq4sam.evaluation.evaluate import evaluate_sam
from ptq4sam.files import write_json
from ptq4sam.model.cache import ActivationCache
from ptq4sam.model.calibrated import CalibratedState
from ptq4sam.model.calibration import calibrate
from ptq4sam.model.insertion import QuantizedSam, insert_quantizers
from ptq4sam.model.journal import Journal, run_fingerprint
from ptq4sam.model.memory import free_memory, working_bytes
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.numerics import reproducible
from ptq4sam.prompts import PromptSource, cached, open_prompts
from ptq4sam.runs.auditing import audit_model
from ptq4sam.runs.calibration import CalibrationPictures, calibration_pictures
from ptq4sam.runs.reproducibility import fix_seeds, versions
from ptq4sam.runs.run_log import package_log_to
from ptq4sam.runs.settings import DataSettings, find_device
from ptq4sam.runs.stages import Stages
from ptq4sam.sam.checkpoint import load_sam
from ptq4sam.sam.model import Sam
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
T = TypeVar("T")

_KEPT = 4
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
    _kept: dict[str, dict[Any, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.threads is not None:
            torch.set_num_threads(self.threads)

    @reproducible()
    def do(self, task: Task) -> Outcome:
        """Do a task; whatever goes wrong is in the outcome."""
        stages = Stages()
        work: dict[str, Callable[[Task, Stages], dict[str, Any] | None]] = {
            "boxes": self._boxes,
            "calibration boxes": self._calibration_boxes,
            "float": self._float,
            "calibration": self._calibration,
            "trial": self._trial,
        }
        metrics, problem = None, None
        with _logged() as log:
            try:
                metrics = work[task.kind](task, stages)
            except Exception as error:
                problem = _in_one_line(error)
                level = logging.WARNING if isinstance(error, Ptq4samError) else logging.ERROR
                _log.log(level, "%s failed: %s", task.kind, problem, exc_info=True)
        if problem is not None:
            self._let_go()
        return Outcome(problem, metrics, stages.to_dict(), _versions(), self.name, log.getvalue())

    def _trial(self, task: Task, stages: Stages) -> dict[str, Any]:
        settings = task.settings
        fix_seeds(settings.seed)
        with stages.stage("load"):
            sam = self._sam(settings)
            dataset, source = self._evaluated(settings)
            reference = self._float_results(settings)
            calibrated = self._calibrated(settings)
        with stages.stage("quantize"):
            quantized = self._quantize(task, sam, calibrated)
        with stages.stage("audit"):
            report = audit_model(quantized)
        _log.info("%s", report.lines()[0])
        if not report.passed and settings.scheme.compat == "faithful":
            finding = report.findings[0]
            raise CalibrationError(f"the audit failed: {finding.where} {finding.problem}")
        agreement = Agreement(reference)
        with stages.stage("evaluate"):
            evaluation = evaluate_sam(
                quantized, dataset, source, settings.prompting, on_picture=agreement
            )
        # Nothing can be lost any more; the records of trials are the parent's.
        shutil.rmtree(self.folder.journal(task.key), ignore_errors=True)
        return {
            **evaluation.metrics,
            "agreement": agreement.mean,
            "pictures": evaluation.pictures,
            "masks": evaluation.masks,
            "folded": quantized.folded,
            "audit": report.passed,
            "float": reference.metrics,
        }

    def _quantize(self, task: Task, sam: Sam, calibrated: CalibratedState) -> QuantizedSam:
        settings, scheme = task.settings, task.settings.scheme
        if scheme.recon is None:
            return quantize_sam(
                sam, (), scheme, quantize_encoder=settings.quantize_encoder, calibrated=calibrated
            )
        items = self._items(settings)
        own = not scheme.recon.keep_gpu and sam.device.type != "cpu"
        free = free_memory(sam.device)
        if sam.device.type != "cpu":
            free = max(0, free - working_bytes(sam))
        budget = 0 if own else free // (2 * self.workers)
        folder = self.folder.journal(task.key)
        return quantize_sam(
            sam,
            items,
            scheme,
            quantize_encoder=settings.quantize_encoder,
            seed=settings.seed,
            cache=ActivationCache(sam.device, budget, folder),
            journal=self._journal(task, sam, items),
            calibrated=calibrated,
        )

    def _journal(self, task: Task, sam: Sam, items: CalibrationPictures) -> Journal:
        """What a killed worker has finished of the trial, or a new one."""
        settings = task.settings
        fingerprint = run_fingerprint(
            sam,
            items,
            settings.scheme,
            quantize_encoder=settings.quantize_encoder,
            seed=settings.seed,
        )
        folder = self.folder.journal(task.key)
        try:
            return Journal(folder, fingerprint, resume=True)
        except ConfigError as error:
            _log.info("starting the trial again: %s", error)
            shutil.rmtree(folder)
            return Journal(folder, fingerprint, resume=False)

    def _boxes(self, task: Task, stages: Stages) -> None:
        with stages.stage("boxes"):
            dataset, source = self._evaluated(task.settings)
            for record in dataset.images:
                source.prompts(record, dataset.load(record))
            self._mark(task, {"pictures": len(dataset.images)})

    def _calibration_boxes(self, task: Task, stages: Stages) -> None:
        with stages.stage("boxes"):
            self._mark(task, {"pictures": len(self._items(task.settings))})

    def _mark(self, task: Task, content: dict[str, Any]) -> None:
        write_json(content, self.folder.result(task.kind, task.key))

    def _float(self, task: Task, stages: Stages) -> None:
        settings = task.settings
        with stages.stage("load"):
            sam = self._sam(settings)
            dataset, source = self._evaluated(settings)
        with stages.stage("evaluate"):
            evaluation = evaluate_sam(sam, dataset, source, settings.prompting)
        FloatResults.of(evaluation).save(self.folder.result("float", task.key))

    def _calibration(self, task: Task, stages: Stages) -> None:
        settings = task.settings
        with stages.stage("load"):
            sam, items = self._sam(settings), self._items(settings)
        with stages.stage("calibrate"):
            scheme = calibration_scheme(settings.scheme)
            quantized = insert_quantizers(sam, scheme, settings.quantize_encoder)
            calibrate(quantized, items)
        CalibratedState.of(quantized, sam).save(self.folder.result("calibration", task.key))

    def _sam(self, settings: TrialSettings) -> Sam:
        key = _model_key(settings)
        return self._keep("model", key, lambda: load_sam(*key))

    def _evaluated(self, settings: TrialSettings) -> tuple[ImageSet, PromptSource]:
        data = self._data(settings, "val")
        return self._pictures(settings, data, settings.evaluated, settings.prompts)

    def _items(self, settings: TrialSettings) -> CalibrationPictures:
        data, spec = self._data(settings, "train"), settings.boxes_to_calibrate
        dataset, source = self._pictures(settings, data, None, spec, masks=False)
        sam, size, prompting = self._sam(settings), settings.scheme.calibrate, settings.prompting
        return self._keep(
            "items",
            (_model_key(settings), data, spec, size, prompting),
            lambda: calibration_pictures(sam, dataset, source, size, prompting),
        )

    def _data(self, settings: TrialSettings, split: str) -> DataSettings:
        pictures = settings.data if split == "val" else settings.calibration
        if pictures is not None:
            return pictures.data()
        scenes = self.folder.scenes
        return DataSettings(scenes / "images" / split, scenes / "annotations" / f"{split}.json")

    def _pictures(
        self,
        settings: TrialSettings,
        data: DataSettings,
        limit: int | None,
        spec: str,
        masks: bool = True,
    ) -> tuple[ImageSet, PromptSource]:
        """A data set and its boxes; with or without a need of masks."""
        device = _device(settings)

        def load() -> tuple[ImageSet, PromptSource]:
            dataset = data.open(limit=limit, masks=masks)
            source = open_prompts(spec, dataset, device)
            return dataset, cached(source, dataset, self.folder.boxes)

        return self._keep("pictures", (data, limit, spec, device, masks), load)

    def _float_results(self, settings: TrialSettings) -> FloatResults:
        path = self.folder.result("float", float_key(settings))
        return self._keep("float", path, lambda: FloatResults.load(path))

    def _calibrated(self, settings: TrialSettings) -> CalibratedState:
        path = self.folder.result("calibration", calibration_key(settings))
        return self._keep("calibrated", path, lambda: CalibratedState.load(path))

    def _keep(self, kind: str, key: Any, make: Callable[[], T]) -> T:
        """What was made before, or is made now; the last ones of a kind are kept."""
        kept = self._kept.setdefault(kind, {})
        found: T = kept.pop(key) if key in kept else make()
        kept[key] = found
        while len(kept) > _KEPT:
            kept.pop(next(iter(kept)))
        return found

    def _let_go(self) -> None:
        """Free all memory after a failure: it may have been too little."""
        self._kept.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _device(settings: TrialSettings) -> torch.device:
    return find_device(settings.device)


def _model_key(settings: TrialSettings) -> tuple[str, Path | None, torch.device]:
    """What `load_sam` is called with."""
    return settings.model, settings.checkpoint, _device(settings)


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
    return what if isinstance(error, Ptq4samError) else f"{type(error).__name__}: {what[:500]}"


@contextlib.contextmanager
def _logged() -> Iterator[io.StringIO]:
    """What the package logs within the `with` block, as text."""
    text = io.StringIO()
    with package_log_to(logging.StreamHandler(text), logging.INFO):
        yield text
