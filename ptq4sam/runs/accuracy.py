"""Accuracy control: return the units that hurt most to 8 bits or float until a drop is met.

What a unit does is measured: the model with this unit alone at more bits, on some pictures. Then
the fewest of the best units are sought that bring the model within the drop, by bisection,
with all validation pictures measured each time; what is kept was itself measured to be enough.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ptq4sam.errors import ConfigError
from ptq4sam.methods.assignment import make_quantizer
from ptq4sam.model.exchange import exchanged, take_units, units_with_norms
from ptq4sam.model.insertion import ENCODER, QuantizedSam, model_units
from ptq4sam.quantization.levels import FLOAT, bits_of_level, described_level
from ptq4sam.quantization.modes import has_quantizers
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.runs.measurements import Measurements
from ptq4sam.runs.settings import AccuracySettings
from ptq4sam.runs.validation import Validation
from ptq4sam.sam.model import Sam

_log = logging.getLogger(__name__)

HIGH_BITS = 8

Level = int | str
Levels = dict[str, Level]


@dataclass
class AccuracyReport:
    """What accuracy control did.

    Attributes:
        metric: what was measured.
        max_drop: percentage points of the metric that may be lost; scores are in percent.
        float_score: of the float model.
        score_before: of the model as quantized.
        score: of the model as it was left.
        kept: units that are not quantized as the rest, and their bits or "float".
        effects: what each unit alone gives back, best first, by level.
        measured: models that were measured, float included.
    """

    metric: str
    max_drop: float
    float_score: float
    score_before: float
    score: float
    kept: Levels = field(default_factory=dict)
    effects: dict[str, dict[str, float]] = field(default_factory=dict)
    measured: int = 0

    @property
    def met(self) -> bool:
        """Whether the drop is within its limit."""
        return self.float_score - self.score <= self.max_drop

    def to_dict(self) -> dict[str, Any]:
        """For metrics.json."""
        return {**vars(self), "drop": self.float_score - self.score, "met": self.met}


def levels_above(scheme: Scheme) -> list[Level]:
    """What units can be returned to: 8 bits where there are fewer, then float."""
    bits = (scheme.w_qconfig.bit, scheme.a_qconfig.bit)
    return [HIGH_BITS, FLOAT] if min(bits) < HIGH_BITS >= max(bits) else [FLOAT]


def require_levels(scheme: Scheme) -> None:
    """Refuse, before hours of quantization, a scheme whose units cannot be returned to a level.

    Raises:
        ConfigError: a grid of its slots does not have so many bits, or no device takes them.
    """
    for level in levels_above(scheme):
        unit = scheme.with_units({"unit": level}).of_unit("unit")
        if unit is None:
            continue
        for selector in unit.slot_formats:
            slot, *roles = selector.split("@")
            try:
                quantizer = make_quantizer(unit, slot, frozenset(roles))
                if quantizer.grid.bits > quantizer.device_bits:
                    raise ConfigError(f"devices take up to {quantizer.device_bits}")
            except ConfigError as error:
                raise ConfigError(
                    f"accuracy control returns units to {level} bits, which slots.{selector} "
                    f"cannot have ({error}): use another grid there, or no accuracy control"
                ) from error


def control_accuracy(
    sam: QuantizedSam,
    float_sam: Sam,
    at_level: Callable[[Level], QuantizedSam],
    validation: Validation,
    settings: AccuracySettings,
    measurements: Measurements,
) -> AccuracyReport:
    """Return units of a frozen model to more bits, in place, until it is good enough.

    Args:
        sam: the model; its scheme says afterwards what was kept.
        float_sam: the float model.
        at_level: gives the model with all units at a level.
        validation: what is measured, and on which pictures.
        settings: how much may be lost.
        measurements: keeps what was measured.
    """
    control = _Control(sam, validation, measurements)
    known = measurements.value("float", lambda: validation.score(float_sam, "float"))
    before = control.score({}, None)
    report = AccuracyReport(settings.metric, settings.max_drop, known, before, before)
    _log.info("%s: %.2f float, %.2f quantized", settings.metric, known, before)
    for level in levels_above(sam.scheme):
        if report.met:
            break
        donor = at_level(level)
        effects = control.effects(level, donor, settings.pictures)
        report.effects[str(level)] = effects
        order = list(effects)
        count = control.fewest(order, level, donor, known - settings.max_drop)
        kept = dict.fromkeys(order[:count], level)
        report.score = control.score(kept, donor)
        take_units(sam, kept, donor)
        report.kept.update(kept)
    report.measured = 1 + len(control.scored)
    _tell(report, sum(1 for _ in model_units(sam)))
    return report


@dataclass
class _Control:
    sam: QuantizedSam
    validation: Validation
    measurements: Measurements
    scored: set[str] = field(default_factory=set)

    def score(self, levels: Mapping[str, Level], donor: QuantizedSam | None) -> float:
        """The score on all validation pictures, with some more units taken from a donor."""
        every = {**self.sam.scheme.units, **levels}
        described = _described(every)
        self.scored.add(described)
        encoder = _described({k: v for k, v in every.items() if k.startswith(f"{ENCODER}.")})

        def measure() -> float:
            units = {} if donor is None else units_with_norms(donor)
            taken = {path: module for name in levels for path, module in units[name].items()}
            with exchanged(self.sam, taken):
                return self.validation.score(self.sam, encoder)

        score: float = self.measurements.value(f"units {described}", measure)
        return score

    def effects(self, level: Level, donor: QuantizedSam, pictures: int) -> dict[str, float]:
        """What each lower unit gives back at a level, on some pictures, best first."""
        scheme, own = self.sam.scheme, dict(model_units(self.sam))
        units = {
            name: unit
            for name, unit in units_with_norms(donor).items()
            # A norm between units is one too, and has nothing to give back.
            if has_quantizers(own[name]) and _bits(scheme.units.get(name, 0)) < _bits(level)
        }
        found = self.validation.gains_of_changes(
            self.sam,
            units,
            pictures,
            self.measurements,
            f"one unit to {level} beside {_described(scheme.units)}",
        )
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def fewest(self, order: Sequence[str], level: Level, donor: QuantizedSam, enough: float) -> int:
        """How many of the first units must have a level for a score; all where less do not.

        By bisection, as if every unit helped. Whatever is found was measured.
        """
        low, high = 0, len(order)
        while high - low > 1:
            middle = (low + high) // 2
            score = self.score(dict.fromkeys(order[:middle], level), donor)
            _log.info("%d units at %s: %.2f %%", middle, level, score)
            if score >= enough:
                high = middle
            else:
                low = middle
        return high


def _bits(level: Level) -> float:
    return min(bits_of_level(level) or (math.inf,))


def _described(levels: Mapping[str, Level]) -> str:
    return json.dumps(levels, sort_keys=True)


def _tell(report: AccuracyReport, units: int) -> None:
    drop = report.float_score - report.score
    told = _log.info if report.met else _log.warning
    told(
        "accuracy control: drop %.2f percentage points of %s (allowed %.2f), %d of %d units "
        "kept higher",
        drop,
        report.metric,
        report.max_drop,
        len(report.kept),
        units,
    )
    for name, level in report.kept.items():
        _log.info("kept %s: %s", described_level(level), name)
