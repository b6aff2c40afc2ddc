"""What metrics.json says of a run."""

from __future__ import annotations

import dataclasses
from typing import Any

from ptq4sam.deploy.backends import AUTO, TORCH
from ptq4sam.deploy.exported import ExportedSam
from ptq4sam.evaluation.evaluate import Evaluation
from ptq4sam.model.audit import AuditReport, EncoderState
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.quantization.levels import FLOAT
from ptq4sam.quantization.scheme import SIMULATIONS
from ptq4sam.runs.context import RunContext
from ptq4sam.runs.inputs import calibration_prompts
from ptq4sam.runs.models import RunModels
from ptq4sam.runs.reproducibility import arithmetic, versions
from ptq4sam.runs.settings import DataSettings, RunSettings
from ptq4sam.runs.summary import NNCF, PTQ4SAM
from ptq4sam.sam.model import PromptableModel


def run_metrics(
    context: RunContext,
    models: RunModels,
    report: AuditReport | None,
    evaluation: Evaluation | None,
) -> dict[str, Any]:
    """Scores, and what they are of.

    Args:
        context: of the run.
        models: of the run.
        report: of the audit; None where there was none.
        evaluation: None of a run that only quantizes.
    """
    settings, sam = context.settings, models.sam
    method = _method(sam, settings.backend)
    metrics: dict[str, Any] = {
        "model": sam.name,
        "image_size": sam.geometry.encoder_side,
        "quantized": method is not None,
    }
    if method is not None:
        metrics["method"] = method
    if isinstance(sam, QuantizedSam) and sam.applied:
        metrics["changed_by"] = sam.applied
    encoder = _encoder(sam, report)
    if encoder is not None:
        metrics["encoder"] = encoder
        metrics["encoder_quantized"] = encoder != FLOAT
    if evaluation is not None:
        metrics.update(evaluation.metrics)
        if evaluation.evaluator is not None:
            metrics["evaluator"] = evaluation.evaluator
        if evaluation.reference_metrics:
            metrics["float"] = evaluation.reference_metrics
        metrics["pictures"] = evaluation.pictures
        metrics["masks"] = evaluation.masks
        metrics["skipped"] = evaluation.skipped
        metrics["prompts"] = settings.prompts
    if models.accuracy is not None:
        metrics["accuracy_control"] = models.accuracy.to_dict()
    if report is not None:
        metrics["audit"] = {"passed": report.passed, "report": report.lines()}
    compat = sam.scheme.compat if isinstance(sam, QuantizedSam) else None
    if compat in SIMULATIONS:
        metrics["warning"] = f"compat: {compat}; not the numbers of a quantized model"
    metrics["asked"] = _asked(settings)
    metrics["seed"] = settings.seed
    metrics["device"] = str(context.device)
    metrics["arithmetic"] = arithmetic(context.device)
    # "auto" of a quantized file is the simulation.
    own = TORCH if settings.backend == AUTO else settings.backend
    metrics["backend"] = sam.runtime if isinstance(sam, ExportedSam) else own
    metrics["versions"] = versions()
    metrics["phases"] = context.phases.to_dict()
    return metrics


def _method(sam: PromptableModel, backend: str) -> str | None:
    """What quantized a model; None for a float one."""
    if isinstance(sam, ExportedSam):
        if sam.manifest.nncf is not None:
            return NNCF
        return None if sam.manifest.scheme is None else PTQ4SAM
    deployed = backend != "torch"
    return PTQ4SAM if deployed or isinstance(sam, QuantizedSam) else None


def _encoder(sam: PromptableModel, report: AuditReport | None) -> EncoderState | None:
    """Whether the image encoder of a quantized model is quantized; None for another model."""
    if report is not None:
        return report.encoder
    if isinstance(sam, ExportedSam) and sam.manifest.nncf is not None:
        return "quantized"
    model = sam.manifest if isinstance(sam, ExportedSam) else sam
    quantized: bool | None = getattr(model, "encoder_quantized", None)
    return None if quantized is None else "quantized" if quantized else FLOAT


def _asked(settings: RunSettings) -> dict[str, Any]:
    """What the numbers are of, for whoever finds them later."""
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
        found["calibration_prompts"] = calibration_prompts(settings)
        found["calibration_pictures"] = settings.scheme.calibrate
    return found
