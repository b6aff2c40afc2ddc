"""A study from its settings to its files."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ptq4sam.deploy.cost import meta_sam
from ptq4sam.errors import ConfigError
from ptq4sam.evaluation.evaluate import has_truth
from ptq4sam.families.efficientvit.published import FLOAT_MEAN_IOU, MEGABYTE, layer_results
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.model.switches import require_switchable
from ptq4sam.numerics import reproducible
from ptq4sam.operators.base import quantized_layers
from ptq4sam.progress import Progress, silent
from ptq4sam.prompts import GroundTruth
from ptq4sam.quantization.modes import WEIGHT_QUANTIZER, quantizers
from ptq4sam.quantization.scheme import STUDY
from ptq4sam.records import Record, unknown_key
from ptq4sam.runs.measurements import Measurements
from ptq4sam.runs.prepared import Preparation, Prepared, digest
from ptq4sam.runs.quantizing import JOURNAL
from ptq4sam.runs.reproducibility import versions
from ptq4sam.runs.settings import RunSettings
from ptq4sam.runs.work_dir import working_in
from ptq4sam.sam.addresses import label
from ptq4sam.studies.sensitivity.effects import METRICS, Effect
from ptq4sam.studies.sensitivity.report import Row, Sensitivities
from ptq4sam.studies.sensitivity.study import ALL_BUT, FLOAT, ONLY, QUANTIZED, Key, Study
from ptq4sam.studies.sensitivity.targets import MODEL, ROLES, Target, targets_of

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StudySettings(Record):
    """What is studied.

    Attributes:
        grains: parts of the model, of GRAINS.
        roles: that parts are split by, of ROLES.
        patterns: names of targets with `*` and `?`; none for all.
        measure: so many of the worst of each grain are measured on all pictures.
        proxy_pictures: pictures that all targets are compared on.
        pictures: pictures that the worst are measured on.
        alone: as published studies do: each target alone is measured on all pictures, none with all
            but it, and nothing before on the proxy's.
        metric: what orders those: "mean_iou", "AP" or "agreement"; None for the mean IoU where
            prompts are ground truth, else the AP where there is a truth, else the agreement.
        resume: go on with what a killed study has measured.
    """

    grains: tuple[str, ...] = ("unit",)
    roles: tuple[str, ...] = ROLES
    patterns: tuple[str, ...] = ()
    measure: int = 10
    proxy_pictures: int = 4
    pictures: int = 32
    alone: bool = False
    metric: str | None = None
    resume: bool = False

    def _validate(self) -> None:
        self._require(self.measure >= 0, "measure", "0 or more")
        self._require(self.proxy_pictures >= 1, "proxy_pictures", "1 or more")
        self._require(self.pictures >= 1, "pictures", "1 or more")
        if self.metric is not None and self.metric not in METRICS:
            raise unknown_key(self.metric, METRICS).within("metric")


@reproducible()
def study_model(
    settings: RunSettings, asked: StudySettings, progress: Progress = silent
) -> Sensitivities:
    """Quantize or load a model, study it, write sensitivity.json and sensitivity.csv.

    Raises:
        ConfigError: what was asked for does not go together.
    """
    preparation = Preparation(settings, progress)
    with working_in(settings.work_dir):
        # Before hours of quantization: what is measured there, and what is not there at all.
        metric = _metric(asked.metric, preparation, asked.alone)
        planned_targets(settings, asked)
        prepared = preparation.prepare()
        targets = targets_of(prepared.sam, asked.grains, asked.roles, asked.patterns)
        study = _study(settings, asked, prepared, progress)
        measure = _measure_alone if asked.alone else _measure
        found = measure(study, targets, asked, metric)
        proxy = asked.pictures if asked.alone else asked.proxy_pictures
        about = {
            "model": prepared.sam.name,
            "scheme": prepared.sam.scheme.to_dict(),
            "metric": metric,
            "prompts": settings.prompts,
            "pictures": {
                "proxy": len(study.with_boxes(proxy)),
                "measured": len(study.with_boxes(asked.pictures)),
            },
            "published_float": {"mean_iou": FLOAT_MEAN_IOU.get(label(prepared.sam.name))},
            "seed": settings.seed,
            "versions": versions(),
        }
        result = dataclasses.replace(found, about=about)
        for path in result.write(settings.work_dir):
            _log.info("wrote %s", path)
        preparation.forget_journal()
    return result


def planned_targets(settings: RunSettings, asked: StudySettings) -> list[Target]:
    """The targets of a model that is not quantized yet; none where a file would tell.

    Raises:
        ConfigError: a grain or role is unknown, or a pattern matches nothing; a method corrects
            what no switch takes back.
    """
    if settings.scheme is None:
        return []
    sam = meta_sam(settings.float_model, settings.scheme, settings.quantize_encoder)
    if not isinstance(sam, QuantizedSam):
        raise TypeError("a scheme makes a quantized model")
    require_switchable(sam)
    return targets_of(sam, asked.grains, asked.roles, asked.patterns)


def _metric(asked: str | None, preparation: Preparation, alone: bool) -> str:
    dataset, source = preparation.pictures()
    truth = has_truth(dataset)
    if alone and asked is None and not isinstance(source, GroundTruth):
        return "agreement"
    if alone and asked == "AP":
        raise ConfigError(
            "the AP of each target alone is not measured: order by mean_iou or agreement, or "
            "measure the worst"
        )
    if asked is None:
        return "mean_iou" if isinstance(source, GroundTruth) else "AP" if truth else "agreement"
    if asked == "mean_iou" and not isinstance(source, GroundTruth):
        raise ConfigError("the mean IoU is of annotated boxes: use ground-truth prompts")
    if asked == "AP" and not truth:
        raise ConfigError("the AP needs annotations: give some, or measure the agreement")
    return asked


def _study(
    settings: RunSettings, asked: StudySettings, prepared: Prepared, progress: Progress
) -> Study:
    source = prepared.source
    fingerprint = {
        "model": digest(prepared.sam),
        "float model": digest(prepared.float_sam),
        "pictures": f"{prepared.dataset.fingerprint()} {source.name} {source.fingerprint()}",
        "prompting": json.dumps(dataclasses.asdict(settings.prompting)),
        "targets": json.dumps({**asked.to_dict(), "metric": None, "resume": None}),
    }
    path = settings.work_dir / JOURNAL / "measurements.json"
    measurements = Measurements(path, fingerprint, resume=asked.resume)
    return Study(
        prepared.sam,
        prepared.float_sam,
        prepared.dataset,
        source,
        settings.prompting,
        measurements,
        progress,
    )


def _measure(
    study: Study, targets: Sequence[Target], asked: StudySettings, metric: str
) -> Sensitivities:
    """The cheap proxy for all targets, then the metric for the worst of each grain."""
    proxy = study.effects(targets, asked.proxy_pictures, "signal to noise")
    by_proxy = sorted(targets, key=lambda target: _decibels(proxy[ONLY, target.name]))
    worst: list[Target] = []
    for grain in dict.fromkeys(target.grain for target in targets):
        of_grain = [target for target in by_proxy if target.grain == grain]
        worst += of_grain[: asked.measure]
    measured: dict[Key, Effect] = {}
    if worst:
        measured = study.effects(worst, asked.pictures, "worst targets", scored=True)
    effects = {**proxy, **measured}
    worst.sort(key=lambda target: _value(effects[ONLY, target.name], metric))
    rest = [target for target in by_proxy if target not in worst]
    rows = _rows(study.sam, worst, rest, effects)
    return Sensitivities({}, effects[FLOAT, ""], effects[QUANTIZED, ""], proxy[QUANTIZED, ""], rows)


def _measure_alone(
    study: Study, targets: Sequence[Target], asked: StudySettings, metric: str
) -> Sensitivities:
    """The metric for each target alone, and for the whole model."""
    (whole,) = targets_of(study.sam, (MODEL,), ())
    others = [target for target in targets if target.name != whole.name]
    effects = study.effects([whole, *others], asked.pictures, "each alone", kinds=(ONLY,))
    ordered = sorted(targets, key=lambda target: _value(effects[ONLY, target.name], metric))
    rows = _rows(study.sam, ordered, (), effects)
    return Sensitivities({}, effects[FLOAT, ""], effects[ONLY, whole.name], None, rows)


def _rows(
    sam: QuantizedSam, worst: Sequence[Target], rest: Sequence[Target], effects: dict[Key, Effect]
) -> tuple[Row, ...]:
    bits = {name: quantizer.grid.bits for name, quantizer in quantizers(sam)}
    published = layer_results(sam.name)
    ranks: dict[str, int] = {}
    rows = []
    for target in [*worst, *rest]:
        rank = ranks[target.grain] = ranks.get(target.grain, 0) + 1
        own = tuple(sorted({bits[name] for name in target.quantizers}))
        rows.append(
            Row(
                target,
                own,
                effects[ONLY, target.name],
                effects.get((ALL_BUT, target.name)),
                target in worst,
                rank,
                _megabytes_saved(sam, target),
                None if target.role else published.get(target.path),
            )
        )
    return tuple(rows)


def _megabytes_saved(sam: QuantizedSam, target: Target) -> float:
    """What the target's weights take less than in float16, in 2^20 bytes.

    Under `compat: study` with biases, each of which it counts as a byte.
    """
    saved = 0.0
    for name, layer in quantized_layers(sam):
        if f"{name}.{WEIGHT_QUANTIZER}" in target.quantizers:
            spared = (16 - layer.weight_quantizer.grid.bits) / 8
            saved += spared * layer.weight.numel()
            if sam.scheme.compat == STUDY and layer.bias is not None:
                saved += layer.bias.numel()
    return saved / MEGABYTE


def _decibels(effect: Effect) -> float:
    return float("inf") if effect.logits_sqnr_db is None else effect.logits_sqnr_db


def _value(effect: Effect, metric: str) -> float:
    value: Any = getattr(effect, metric)
    return float("inf") if value is None else float(value)
