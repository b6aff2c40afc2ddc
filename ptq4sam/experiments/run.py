"""Do one run: quantize where asked, prove it, evaluate, leave all in the work directory."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import platform
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

import ptq4sam
from ptq4sam import parallel
from ptq4sam.data import CocoDataset, ImageSet, open_images
from ptq4sam.deploy.backends import open_backend
from ptq4sam.deploy.container import is_quantized_file
from ptq4sam.deploy.exported import ExportedSam
from ptq4sam.deploy.manifest import origin
from ptq4sam.deploy.size_report import size_report
from ptq4sam.deploy.storage import load, save
from ptq4sam.errors import CalibrationError, CheckpointError, ConfigError
from ptq4sam.evaluation import write_json
from ptq4sam.experiments.accuracy import AccuracyReport
from ptq4sam.experiments.calibration import calibration_pictures
from ptq4sam.experiments.evaluate import Evaluation, Picture, evaluate_sam, has_truth
from ptq4sam.experiments.needed import require_inputs
from ptq4sam.experiments.pictures import PictureWriter
from ptq4sam.experiments.quantizing import JOURNAL, Quantizing
from ptq4sam.experiments.record import PartRecord, RunRecord
from ptq4sam.experiments.recording import PictureRecorder
from ptq4sam.experiments.settings import DataSettings, RunSettings
from ptq4sam.experiments.stages import Stages
from ptq4sam.experiments.summary import NNCF, PTQ4SAM
from ptq4sam.experiments.validation import Validation
from ptq4sam.files import replacing
from ptq4sam.model.audit import AuditReport, audit
from ptq4sam.model.cache import ActivationCache
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.progress import Progress, silent
from ptq4sam.prompts import PromptSource, cached, open_prompts
from ptq4sam.sam.checkpoint import EMBEDDED_FILE, load_sam
from ptq4sam.sam.model import PromptableModel, Sam
from ptq4sam.sam.predictor import Predictor

_log = logging.getLogger(__name__)

ENDED = "the run has ended"
"""Begins the last line of the log of a run that came to its end."""


class Run:
    """One run of the framework; `execute` does it.

    Several processes (see `parallel`) do it together, and the first one writes.
    """

    def __init__(self, settings: RunSettings, progress: Progress = silent) -> None:
        self.settings = settings
        self.progress = progress
        self.stages = Stages()
        self.device = parallel.local_device(settings.torch_device())
        self.accuracy: AccuracyReport | None = None
        self.record = RunRecord(threshold=settings.show_threshold)

    def execute(self) -> dict[str, Any]:
        """Quantize, audit, evaluate, write; returns what metrics.json holds, or the plan.

        Raises:
            Ptq4samError: something that was asked for cannot be had; one line says what.
        """
        settings = self.settings
        require_inputs(settings)
        self._make_folders()
        with logging_to(settings.work_dir / "run.log"):
            fix_seeds(settings.seed)
            if settings.dry_run:
                return self._plan()
            # First of all, for a mistake in it should not show after hours of quantization.
            data = self._data()
            sam, reference = self._models()
            report = None
            # Layers on integers have no quantizers that could be watched.
            if isinstance(sam, QuantizedSam) and self.settings.backend == "torch":
                report = self._audit(sam)
            if parallel.is_first():
                self._save(sam)
            evaluation = self._evaluate(sam, reference, *data) if data is not None else None
            metrics = self._metrics(sam, report, evaluation)
            if parallel.is_first():
                self.record.write(settings.work_dir)
                write_json(metrics, settings.work_dir / "metrics.json")
                # All that the journal was for is in the results now.
                shutil.rmtree(settings.work_dir / JOURNAL, ignore_errors=True)
                _log.info("%s: %s", ENDED, settings.work_dir / "metrics.json")
            if report is not None and not report.passed and not _published(sam):
                raise CalibrationError(
                    f"the audit found {len(report.findings)} places that are not quantized "
                    f"(first: {report.findings[0].where} {report.findings[0].problem}): "
                    "its numbers are not those of a quantized model; please report this"
                )
        return metrics

    def _plan(self) -> dict[str, Any]:
        settings = self.settings
        with self.stages.stage("load"):
            sam = load_sam(settings.float_model, settings.checkpoint, device=self.device)
        plan = self._prepare(sam).plan
        return {
            "plan": plan.lines(),
            "units": [dataclasses.asdict(unit) for unit in plan.units],
            "memory_budget": plan.budget,
        }

    def _make_folders(self) -> None:
        """Make the folders of all outputs, so that a run does not fail at its end.

        Raises:
            ConfigError: one cannot be made or written to.
        """
        settings = self.settings
        folders = [settings.work_dir, settings.show_dir]
        for path in filter(None, (settings.results, settings.save_model)):
            if path.is_dir():
                raise ConfigError(f"asked to write file {path}, which is a folder: name a file")
            folders.append(path.parent)
        for folder in filter(None, folders):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                problem = None if os.access(folder, os.W_OK) else "no permission"
            except OSError as error:
                problem = error.strerror
            if problem is not None:
                raise ConfigError(f"cannot write into folder {folder} ({problem}): name another")

    def _models(self) -> tuple[PromptableModel, PromptableModel | None]:
        """The evaluated model, and the float one to compare it with."""
        settings = self.settings
        if settings.backend != "torch" and settings.checkpoint is not None:
            return self._deployed(settings.checkpoint)
        if settings.checkpoint is not None and is_quantized_file(settings.checkpoint):
            if settings.scheme is not None:
                raise ConfigError(
                    f"{settings.checkpoint} is quantized already, so --scheme has no meaning: "
                    "leave it away, or give float weights"
                )
            with self.stages.stage("load"):
                quantized = load(settings.checkpoint, self.device)
                self._check_name(quantized.name)
                reference = self._origin(quantized.name, origin(quantized))
            return quantized, reference
        if settings.float_checkpoint is not None:
            raise ConfigError(
                f"a float checkpoint is what a quantized model is compared with, but "
                f"{settings.checkpoint or settings.float_model} is not quantized"
            )
        with self.stages.stage("load"):
            sam = load_sam(settings.float_model, settings.checkpoint, device=self.device)
        if settings.scheme is None:
            return sam, None
        validation = self._validation()
        quantizing = self._prepare(sam)
        with self.stages.stage("quantize"):
            quantized = quantizing.run(validation)
        self.accuracy = quantizing.accuracy
        if parallel.is_first():
            with self.stages.stage("distributions"):
                seen = quantizing.distributions(quantized)
            self._keep(distributions=seen, units=quantizing.units)
        return quantized, sam

    def _keep(self, **fields: Any) -> None:
        self.record = dataclasses.replace(self.record, **fields)

    def _validation(self) -> Validation | None:
        """Where accuracy is controlled."""
        settings, accuracy = self.settings, self.settings.accuracy
        if accuracy is None:
            return None
        evaluated = accuracy.images is None
        pair = settings.data if accuracy.images is None else DataSettings(accuracy.images)
        if pair is None:
            raise ValueError("AccuracySettings has pictures, or the run evaluates some")
        annotations = pair.annotations if evaluated else accuracy.annotations
        with self.stages.stage("validation data"):
            limit = accuracy.limit or (settings.limit if evaluated else None)
            dataset = self._dataset(DataSettings(pair.images, annotations), limit)
            if not isinstance(dataset, CocoDataset) or not has_truth(dataset):
                raise ConfigError(
                    f"accuracy is measured on annotated pictures, but {annotations} has no "
                    "annotations of those: give others"
                )
            prompts = "ground-truth" if accuracy.metric == "mean_iou" else settings.prompts
            source = self._source(prompts, dataset)
        cache = ActivationCache(self.device, settings.memory_budget, settings.work_dir)
        return Validation(
            dataset, source, settings.prompting, accuracy.metric, cache, self.progress
        )

    def _deployed(self, checkpoint: Path) -> tuple[PromptableModel, PromptableModel | None]:
        """A model on another backend than torch, and the float one that it was made of."""
        settings = self.settings
        with self.stages.stage("load"):
            model = open_backend(checkpoint, settings.backend, settings.precision)
            self._check_name(model.name)
            made_of = model.manifest.origin if isinstance(model, ExportedSam) else origin(model)
            return model, self._origin(model.name, made_of)

    def _check_name(self, found: str) -> None:
        asked, checkpoint = self.settings.model, self.settings.checkpoint
        if asked not in (None, found):
            raise CheckpointError(
                f"asked for {asked}, but {checkpoint} is a quantized {found}: give another file, "
                "or leave the model's name away"
            )

    def _origin(self, name: str, made_of: str) -> Sam | None:
        """The float model that a quantized one was made of, where it is at hand."""
        path = self.settings.float_checkpoint
        if path is None and (name != "vit_nano" or not EMBEDDED_FILE.is_file()):
            return None
        sam = load_sam(name, path, device=self.device)
        if origin(sam) == made_of:
            return sam
        if path is not None:
            raise CheckpointError(
                f"{self.settings.checkpoint} was not made of {path}: give the float weights that "
                "were quantized, or none"
            )
        _log.info("no agreement: the model was made of other weights than the embedded ones")
        return None

    def _save(self, sam: PromptableModel) -> None:
        described = self.settings.work_dir / "scheme.yaml"
        if not isinstance(sam, QuantizedSam):
            # That of an earlier run would be taken for this one's.
            described.unlink(missing_ok=True)
            return
        with replacing(described) as scheme:
            scheme.write_text(sam.scheme.to_yaml(), encoding="utf-8")
        path = self.settings.save_model
        if path is None:
            return
        with self.stages.stage("save"):
            try:
                save(sam, path)
            except SafetensorError as error:
                raise CheckpointError(f"cannot write {path}: {error}") from error
        sizes = size_report(path)
        _log.info("wrote %s: %s", path, sizes.summary())
        self._keep(file=tuple(PartRecord(**vars(part)) for part in sizes.parts))

    def _prepare(self, sam: Sam) -> Quantizing:
        settings, scheme = self.settings, self.settings.scheme
        if scheme is None or settings.calibration is None:
            raise ValueError("RunSettings has a scheme and calibration data, or neither")
        with self.stages.stage("calibration boxes"):
            dataset = self._dataset(settings.calibration, limit=None)
            source = self._source(self._calibration_prompts(), dataset)
            items = calibration_pictures(
                sam, dataset, source, scheme.calibrate, settings.prompting, self.progress
            )
        with self.stages.stage("plan"):
            return Quantizing(settings, sam, items, scheme, self.progress)

    def _calibration_prompts(self) -> str:
        settings = self.settings
        if settings.calibration_prompts is not None:
            return settings.calibration_prompts
        if settings.prompts.endswith(".json"):
            _log.info(
                "calibrating with ground-truth boxes: %s is for other pictures", settings.prompts
            )
            return "ground-truth"
        return settings.prompts

    def _data(self) -> tuple[ImageSet, PromptSource] | None:
        """What is evaluated, and its boxes."""
        settings = self.settings
        if settings.data is None:
            return None
        with self.stages.stage("data"):
            dataset = self._dataset(settings.data, settings.limit)
            source = self._source(settings.prompts, dataset)
        if settings.score and not has_truth(dataset):
            _log.warning(
                "%s has no annotations: masks are written, but not scored", settings.data.images
            )
        return dataset, source

    def _dataset(self, data: DataSettings, limit: int | None) -> ImageSet:
        return open_images(
            data.images, data.annotations, skip_bad=self.settings.skip_bad, limit=limit
        )

    def _source(self, prompts: str, dataset: ImageSet) -> PromptSource:
        if prompts == "ground-truth" and not has_truth(dataset):
            raise ConfigError(
                "asked for ground-truth boxes of pictures without annotations: give annotations, "
                "or boxes.json, onnx:FILE or another detector for prompts"
            )
        source = open_prompts(prompts, dataset, device=self.device)
        return cached(source, dataset, self.settings.cache_dir)

    def _audit(self, sam: QuantizedSam) -> AuditReport:
        """Check the model on a picture of noise: what it shows does not matter, only its bits."""
        with self.stages.stage("audit"):
            report = audit_model(sam)
        for line in report.lines():
            (_log.info if report.passed else _log.warning)("%s", line)
        return report

    def _evaluate(
        self,
        sam: PromptableModel,
        reference: PromptableModel | None,
        dataset: ImageSet,
        source: PromptSource,
    ) -> Evaluation:
        settings = self.settings
        show_dir, results = settings.show_dir, settings.results
        if not has_truth(dataset):
            show_dir = show_dir or settings.work_dir / "show"
            results = results or settings.work_dir / "masks.json"
        writer = None
        if show_dir is not None:
            writer = PictureWriter(show_dir, dataset, settings.show_threshold)
        elif not settings.score:
            reference = None
        recorder = PictureRecorder(settings.show_threshold)

        def look(picture: Picture) -> None:
            recorder(picture)
            if writer is not None:
                writer(picture)

        with self.stages.stage("evaluate"):
            evaluation = evaluate_sam(
                sam,
                dataset,
                source,
                settings.prompting,
                reference=reference,
                progress=self.progress,
                on_picture=look,
                score=settings.score,
            )
            self._keep(scores=recorder.scores(), worst=recorder.worst())
        evaluation.skipped = dict(dataset.skipped)
        if results is not None and parallel.is_first():
            write_json(evaluation.results, results)
            _log.info("wrote %d masks to %s", evaluation.masks, results)
        return evaluation

    def _metrics(
        self, sam: PromptableModel, report: AuditReport | None, evaluation: Evaluation | None
    ) -> dict[str, Any]:
        settings = self.settings
        method = self._method(sam)
        metrics: dict[str, Any] = {"model": sam.name, "quantized": method is not None}
        if method is not None:
            metrics["method"] = method
        if isinstance(sam, QuantizedSam):
            metrics["encoder_quantized"] = sam.encoder_quantized
        if evaluation is not None:
            metrics.update(evaluation.metrics)
            if evaluation.reference_metrics:
                metrics["float"] = evaluation.reference_metrics
            metrics["pictures"] = evaluation.pictures
            metrics["masks"] = evaluation.masks
            metrics["skipped"] = evaluation.skipped
            metrics["prompts"] = settings.prompts
        if self.accuracy is not None:
            metrics["accuracy_control"] = self.accuracy.to_dict()
        if report is not None:
            metrics["audit"] = {"passed": report.passed, "report": report.lines()}
        if isinstance(sam, QuantizedSam) and _published(sam):
            metrics["warning"] = "compat: published; not the numbers of a quantized model"
        metrics["asked"] = self._asked()
        metrics["seed"] = settings.seed
        metrics["device"] = str(self.device)
        metrics["backend"] = sam.runtime if isinstance(sam, ExportedSam) else settings.backend
        metrics["versions"] = versions()
        metrics["stages"] = self.stages.to_dict()
        return metrics

    def _method(self, sam: PromptableModel) -> str | None:
        """What quantized a model; None for a float one."""
        if isinstance(sam, ExportedSam):
            if sam.manifest.nncf is not None:
                return NNCF
            return None if sam.manifest.scheme is None else PTQ4SAM
        deployed = self.settings.backend != "torch"
        return PTQ4SAM if deployed or isinstance(sam, QuantizedSam) else None

    def _asked(self) -> dict[str, Any]:
        """What the numbers are of, for whoever finds them later."""
        settings = self.settings
        found: dict[str, Any] = {
            "checkpoint": None if settings.checkpoint is None else str(settings.checkpoint),
            "quantize_encoder": settings.quantize_encoder,
            "limit": settings.limit,
            "prompting": dataclasses.asdict(settings.prompting),
        }
        for name in ("data", "calibration"):
            pair: DataSettings | None = getattr(settings, name)
            if pair is not None:
                found[name] = {"images": str(pair.images), "annotations": str(pair.annotations)}
        if settings.scheme is not None:
            found["calibration_prompts"] = self._calibration_prompts()
            found["calibration_pictures"] = settings.scheme.calibrate
        return found


def audit_model(sam: QuantizedSam) -> AuditReport:
    """Audit a model on a picture of noise with two boxes."""
    side = sam.image_size
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    boxes = np.array([[0.1, 0.2, 0.6, 0.7], [0.3, 0.1, 0.9, 0.5]]) * side
    predictor = Predictor(sam)

    def forward() -> tuple[torch.Tensor, ...]:
        embedding = predictor.embed(noise)
        prediction = predictor.predict(boxes=boxes, embedding=embedding)
        return embedding.features, prediction.low_res, prediction.iou_predictions

    return audit(sam, forward)


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {
        "ptq4sam": ptq4sam.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def _published(sam: PromptableModel) -> bool:
    return isinstance(sam, QuantizedSam) and sam.scheme.compat == "published"


def fix_seeds(seed: int) -> None:
    """Fix the global generators, for whatever draws from them."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextlib.contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Also write the package's log into a file, the first process's."""
    if not parallel.is_first():
        yield
        return
    handler = logging.FileHandler(path, mode="w")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("ptq4sam")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(min(logging.INFO, before) if before else logging.INFO)
    try:
        yield
    except BaseException as error:
        # On the terminal it is told by whoever catches it.
        what = f"stopped: {' '.join(str(error).split()) or type(error).__name__}"
        handler.handle(logging.LogRecord(__name__, logging.ERROR, "", 0, what, None, None))
        raise
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        handler.close()
