"""Do one run: quantize where asked, prove it, evaluate, leave all in the work directory."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

import ptq4sam
from ptq4sam.data import CocoDataset
from ptq4sam.errors import CalibrationError, ConfigError
from ptq4sam.evaluation import write_json
from ptq4sam.experiments.calibration import calibration_pictures
from ptq4sam.experiments.evaluate import Evaluation, evaluate_sam
from ptq4sam.experiments.pictures import PictureWriter
from ptq4sam.experiments.settings import DataSettings, RunSettings
from ptq4sam.experiments.stages import Stages
from ptq4sam.model.audit import AuditReport, audit
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.model.storage import is_quantized_file, load, save
from ptq4sam.progress import Progress, silent
from ptq4sam.prompts import PromptSource, cached, open_prompts
from ptq4sam.sam.checkpoint import load_sam
from ptq4sam.sam.model import Sam
from ptq4sam.sam.predictor import Predictor

_log = logging.getLogger(__name__)


class Run:
    """One run of the framework; `execute` does it."""

    def __init__(self, settings: RunSettings, progress: Progress = silent) -> None:
        self.settings = settings
        self.progress = progress
        self.stages = Stages()
        self.device = settings.torch_device()

    def execute(self) -> dict[str, Any]:
        """Quantize, audit, evaluate, write; returns what metrics.json holds.

        Raises:
            Ptq4samError: something that was asked for cannot be had; one line says what.
        """
        settings = self.settings
        settings.work_dir.mkdir(parents=True, exist_ok=True)
        with _logging_to(settings.work_dir / "run.log"):
            _fix_seeds(settings.seed)
            sam, reference = self._models()
            report = self._audit(sam) if isinstance(sam, QuantizedSam) else None
            if isinstance(sam, QuantizedSam):
                _write_scheme(sam, settings.work_dir / "scheme.yaml")
                if settings.save_model is not None:
                    with self.stages.stage("save"):
                        save(sam, settings.save_model)
                    _log.info("wrote %s", settings.save_model)
            evaluation = self._evaluate(sam, reference) if settings.data is not None else None
            metrics = self._metrics(sam, report, evaluation)
            write_json(metrics, settings.work_dir / "metrics.json")
            if report is not None and not report.passed and not _published(sam):
                raise CalibrationError(
                    f"the audit found {len(report.findings)} places that are not quantized "
                    f"(first: {report.findings[0].where} {report.findings[0].problem}): "
                    "its numbers are not those of a quantized model; please report this"
                )
        return metrics

    def _models(self) -> tuple[Sam, Sam | None]:
        """The evaluated model, and the float one to compare it with."""
        settings = self.settings
        if settings.checkpoint is not None and is_quantized_file(settings.checkpoint):
            if settings.scheme is not None:
                raise ConfigError(
                    f"{settings.checkpoint} is quantized already, so --scheme has no meaning: "
                    "leave it away, or give float weights"
                )
            with self.stages.stage("load"):
                quantized = load(settings.checkpoint, self.device)
            return quantized, None
        with self.stages.stage("load"):
            sam = load_sam(settings.model, settings.checkpoint, device=self.device)
        if settings.scheme is None:
            return sam, None
        return self._quantize(sam), sam

    def _quantize(self, sam: Sam) -> QuantizedSam:
        settings, scheme = self.settings, self.settings.scheme
        if scheme is None or settings.calibration is None:
            raise ConfigError(
                "a scheme needs pictures to calibrate on: give --calibration-images and "
                "--calibration-annotations"
            )
        size = settings.calibration_size or scheme.calibrate
        with self.stages.stage("calibration boxes"):
            dataset = self._dataset(settings.calibration, limit=None)
            source = self._source(self._calibration_prompts(), dataset)
            items = calibration_pictures(
                sam, dataset, source, size, settings.prompting, self.progress
            )
        with self.stages.stage("quantize"):
            return quantize_sam(
                sam,
                items,
                scheme,
                quantize_encoder=settings.quantize_encoder,
                seed=settings.seed,
                progress=self.progress,
            )

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

    def _dataset(self, data: DataSettings, limit: int | None) -> CocoDataset:
        return CocoDataset(
            data.images, data.annotations, skip_bad=self.settings.skip_bad, limit=limit
        )

    def _source(self, prompts: str, dataset: CocoDataset) -> PromptSource:
        source = open_prompts(prompts, dataset, device=self.device)
        return cached(source, dataset, self.settings.cache_dir)

    def _audit(self, sam: QuantizedSam) -> AuditReport:
        """Check the model on a picture of noise: what it shows does not matter, only its bits."""
        with self.stages.stage("audit"):
            report = audit_model(sam)
        for line in report.lines():
            (_log.info if report.passed else _log.warning)("%s", line)
        return report

    def _evaluate(self, sam: Sam, reference: Sam | None) -> Evaluation:
        settings = self.settings
        if settings.data is None:
            raise ConfigError("there is nothing to evaluate: give --images and --annotations")
        dataset = self._dataset(settings.data, settings.limit)
        source = self._source(settings.prompts, dataset)
        writer = None
        if settings.show_dir is not None:
            writer = PictureWriter(settings.show_dir, dataset, settings.show_threshold)
        with self.stages.stage("evaluate"):
            evaluation = evaluate_sam(
                sam,
                dataset,
                source,
                settings.prompting,
                reference=reference,
                progress=self.progress,
                on_picture=writer,
                score=settings.score,
            )
        evaluation.skipped = dict(dataset.skipped)
        if settings.results is not None:
            write_json(evaluation.results, settings.results)
            _log.info("wrote %s", settings.results)
        return evaluation

    def _metrics(
        self, sam: Sam, report: AuditReport | None, evaluation: Evaluation | None
    ) -> dict[str, Any]:
        settings = self.settings
        quantized = isinstance(sam, QuantizedSam)
        metrics: dict[str, Any] = {"model": sam.name, "quantized": quantized}
        if evaluation is not None:
            metrics.update(evaluation.metrics)
            if evaluation.reference_metrics:
                metrics["float"] = evaluation.reference_metrics
            metrics["pictures"] = evaluation.pictures
            metrics["masks"] = evaluation.masks
            metrics["skipped"] = evaluation.skipped
            metrics["prompts"] = settings.prompts
        if report is not None:
            metrics["audit"] = {"passed": report.passed, "report": report.lines()}
        if isinstance(sam, QuantizedSam) and _published(sam):
            metrics["warning"] = "compat: published; not the numbers of a quantized model"
        metrics["seed"] = settings.seed
        metrics["device"] = str(self.device)
        metrics["versions"] = versions()
        metrics["stages"] = self.stages.to_dict()
        return metrics


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


def _published(sam: Sam) -> bool:
    return isinstance(sam, QuantizedSam) and sam.scheme.compat == "published"


def _fix_seeds(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _write_scheme(sam: QuantizedSam, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(yaml.safe_dump(sam.scheme.to_dict(), sort_keys=False))
    os.replace(temporary, path)


@contextlib.contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """Also write the package's log into a file."""
    handler = logging.FileHandler(path, mode="w")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("ptq4sam")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(min(logging.INFO, before) if before else logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        handler.close()
