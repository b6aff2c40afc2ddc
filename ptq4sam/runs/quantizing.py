"""The quantization of a run: calibration pictures, plan, journal, memory budget, accuracy."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence

from ptq4sam import parallel
from ptq4sam.model.cache import ActivationCache
from ptq4sam.model.calibration import CalibrationItem
from ptq4sam.model.distributions import Distributions, observe_distributions
from ptq4sam.model.insertion import QuantizedSam, insert_quantizers, model_units
from ptq4sam.model.journal import Journal, run_fingerprint
from ptq4sam.model.plan import Plan, make_plan
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.progress import Progress
from ptq4sam.quantization.scheme import FLOAT, Scheme
from ptq4sam.runs.accuracy import AccuracyReport, Level, control_accuracy
from ptq4sam.runs.measurements import Measurements
from ptq4sam.runs.record import UnitRecord, unit_records
from ptq4sam.runs.settings import AccuracySettings, RunSettings
from ptq4sam.runs.validation import Validation
from ptq4sam.sam.model import Sam

_log = logging.getLogger(__name__)

JOURNAL = "journal"
"""Folder in the work directory that holds what a run has finished until it has ended."""


class Quantizing:
    """Quantizes the float model of a run; a killed one goes on where it was.

    Attributes:
        plan: what it will take.
        accuracy: what accuracy control did, once it was run.
        units: how each unit was reconstructed, once it was; the first process's only.
    """

    def __init__(
        self,
        settings: RunSettings,
        sam: Sam,
        items: Sequence[CalibrationItem],
        scheme: Scheme,
        cache: ActivationCache,
        progress: Progress,
    ) -> None:
        self._settings, self._sam, self._items, self._scheme = settings, sam, items, scheme
        self._cache, self._progress = cache, progress
        self.accuracy: AccuracyReport | None = None
        self.units: tuple[UnitRecord, ...] = ()
        self.plan: Plan = make_plan(
            sam,
            items,
            scheme,
            quantize_encoder=settings.quantize_encoder,
            budget=self._cache.budget,
        )
        for line in self.plan.lines():
            _log.info("%s", line)

    def run(self, validation: Validation | None = None) -> QuantizedSam:
        """Quantize, going on with what the journal has if the run is to resume.

        Args:
            validation: where accuracy is controlled, if the settings say so.

        Raises:
            ConfigError: the journal belongs to another run.
            CalibrationError: calibration data are not usable, or a unit diverged.
            ResourceError: memory or disk are used up; what was finished is in the journal.
        """
        quantized = self._quantized(self._scheme, JOURNAL)
        if self._settings.accuracy is not None and validation is not None:
            self.accuracy = self._control(quantized, self._settings.accuracy, validation)
        return quantized

    def _quantized(self, scheme: Scheme, folder: str) -> QuantizedSam:
        settings = self._settings
        journal = None
        if parallel.is_first():
            journal = Journal(
                settings.work_dir / folder, self._fingerprint(scheme), resume=settings.resume
            )
        quantized = quantize_sam(
            self._sam,
            self._items,
            scheme,
            quantize_encoder=settings.quantize_encoder,
            seed=settings.seed,
            progress=self._progress,
            cache=self._cache,
            journal=journal,
            plan=self.plan,
        )
        if journal is not None and folder == JOURNAL:
            self.units = unit_records(journal.parts)
        return quantized

    def distributions(self, quantized: QuantizedSam) -> Distributions:
        """What the quantizers see on the first calibration picture."""
        return observe_distributions(self._sam, quantized, self._items[0])

    def _control(
        self, quantized: QuantizedSam, settings: AccuracySettings, validation: Validation
    ) -> AccuracyReport:
        names = [name for name, _ in model_units(quantized)]

        def at_level(level: Level) -> QuantizedSam:
            scheme = dataclasses.replace(self._scheme, recon=None)
            scheme = scheme.with_units(dict.fromkeys(names, level))
            if level == FLOAT:
                return insert_quantizers(self._sam, scheme, self._settings.quantize_encoder)
            return self._quantized(scheme, f"{JOURNAL}/{level}_bits")

        measured_on = f"{validation.dataset.fingerprint()} {validation.source.fingerprint()}"
        fingerprint = {
            **self._fingerprint(self._scheme),
            "validation": f"{len(validation.dataset.images)} pictures {measured_on}",
            "prompting": json.dumps(dataclasses.asdict(validation.prompting)),
            "metric": f"{settings.metric} of units on {settings.pictures} pictures",
        }
        measurements = Measurements(
            self._settings.work_dir / JOURNAL / "measurements.json",
            fingerprint,
            resume=self._settings.resume,
        )
        return control_accuracy(quantized, self._sam, at_level, validation, settings, measurements)

    def _fingerprint(self, scheme: Scheme) -> dict[str, str]:
        return run_fingerprint(
            self._sam,
            self._items,
            scheme,
            quantize_encoder=self._settings.quantize_encoder,
            seed=self._settings.seed,
        )
