"""The audit of a run: a model that is not quantized must not pass for one."""

from __future__ import annotations

import numpy as np
import torch

from ptq4sam.errors import CalibrationError
from ptq4sam.model.audit import AuditReport, audit
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.sam.model import PromptableModel
from ptq4sam.sam.predictor import Predictor


def audit_model(sam: QuantizedSam) -> AuditReport:
    """Audit a model on a picture of noise with two boxes.

    What the picture shows does not matter, only the bits that it becomes.
    """
    side = sam.image_size
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    boxes = np.array([[0.1, 0.2, 0.6, 0.7], [0.3, 0.1, 0.9, 0.5]]) * side
    predictor = Predictor(sam)

    def forward() -> tuple[torch.Tensor, ...]:
        embedding = predictor.embed(noise)
        prediction = predictor.predict(boxes=boxes, embedding=embedding)
        return embedding.features, prediction.low_res, prediction.iou_predictions

    return audit(sam, forward)


def is_published(sam: PromptableModel) -> bool:
    """Whether a model has the defects of the published implementation, as its scheme asks."""
    return isinstance(sam, QuantizedSam) and sam.scheme.compat == "published"


def require_passed(report: AuditReport, sam: PromptableModel) -> None:
    """Refuse a model with findings, unless its scheme asked for them.

    Raises:
        CalibrationError: there are some.
    """
    if report.passed or is_published(sam):
        return
    raise CalibrationError(
        f"the audit found {len(report.findings)} places that are not quantized "
        f"(first: {report.findings[0].where} {report.findings[0].problem}): "
        "its numbers are not those of a quantized model; please report this"
    )
