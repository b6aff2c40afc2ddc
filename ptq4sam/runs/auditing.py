"""The audit of a run: a model that is not quantized must not pass for one."""

from __future__ import annotations

import logging

import numpy as np
import torch

from ptq4sam.data.scenes import generate_scene
from ptq4sam.errors import CalibrationError
from ptq4sam.extensions import foreign_name
from ptq4sam.model.audit import AuditReport, audit
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.quantization.modes import quantizers
from ptq4sam.quantization.registry import METHODS
from ptq4sam.runs.phases import Phases
from ptq4sam.sam.model import PromptableModel
from ptq4sam.sam.predictor import Predictor

_log = logging.getLogger(__name__)

_SHOWN = 10
"""Lines of an audit that failed; the others are details."""


def audit_model(sam: QuantizedSam) -> AuditReport:
    """Audit a model on a generated scene with two boxes.

    What the picture shows does not matter much: the bits that it becomes are compared, and ranges
    of its activations with those of the quantizers, which were found on other pictures.
    """
    scene = generate_scene(0)
    boxes = np.stack([instance.box for instance in scene.instances[:2]])
    predictor = Predictor(sam)

    def forward() -> tuple[torch.Tensor, ...]:
        embedding = predictor.embed(scene.image)
        prediction = predictor.predict(boxes=boxes, embedding=embedding)
        return embedding.features, prediction.low_res, prediction.iou_predictions

    return audit(sam, forward)


def audit_run(phases: Phases, sam: QuantizedSam) -> AuditReport:
    """Audit the model of a run, as one of its phases, and log what it finds."""
    with phases.phase("audit"):
        report = audit_model(sam)
    lines = report.lines()
    level, shown = (logging.INFO, len(lines)) if report.passed else (logging.WARNING, _SHOWN)
    for line in lines[:shown]:
        _log.log(level, "%s", line)
    if lines[shown:]:
        _log.log(level, "  and %d more", len(lines[shown:]))
    for line in lines[shown:]:
        _log.debug("%s", line)
    return report


def require_passed(report: AuditReport, sam: PromptableModel) -> None:
    """Refuse a model with findings, unless its scheme asked for them.

    Raises:
        CalibrationError: there are some.
    """
    published = isinstance(sam, QuantizedSam) and sam.scheme.compat == "published"
    if report.passed or published:
        return
    foreign = foreign_parts(sam) if isinstance(sam, QuantizedSam) else []
    advice = "please report this"
    if foreign:
        advice = f"{', '.join(foreign)}, not of this package, is in it: check its settings and code"
    raise CalibrationError(
        f"the audit has {len(report.findings)} findings "
        f"(first: {report.findings[0].where} {report.findings[0].problem}): "
        f"its numbers are not those of a quantized model; {advice}"
    )


def foreign_parts(sam: QuantizedSam) -> list[str]:
    """Methods, quantizers and observers in a model that are of extensions, as "method mine"."""
    kinds: list[object] = [METHODS[name] for name in sam.scheme.method_settings]
    for _, quantizer in quantizers(sam):
        kinds += [type(quantizer), type(getattr(quantizer, "observer", None))]
    return list(dict.fromkeys(filter(None, map(foreign_name, kinds))))
