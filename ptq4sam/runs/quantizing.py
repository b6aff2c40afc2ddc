"""The quantization of a run: calibration pictures, plan, journal, memory budget, accuracy."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from ptq4sam import parallel
from ptq4sam.errors import ConfigError
from ptq4sam.model.calibrated import CalibratedState
from ptq4sam.model.calibration import CalibrationItem
from ptq4sam.model.distributions import Distributions, observe_distributions
from ptq4sam.model.insertion import QuantizedSam, insert_quantizers, model_units
from ptq4sam.model.journal import Journal, run_fingerprint
from ptq4sam.model.plan import Plan, make_plan
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.quantization.levels import FLOAT
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.runs.accuracy import AccuracyReport, Level, control_accuracy, require_levels
from ptq4sam.runs.context import RunContext
from ptq4sam.runs.measurements import Measurements
from ptq4sam.runs.record import UnitRecord, unit_records
from ptq4sam.runs.settings import AccuracySettings
from ptq4sam.runs.validation import Validation
from ptq4sam.sam.model import Sam

_log = logging.getLogger(__name__)

JOURNAL = "journal"
"""Folder in the work directory that holds what a run has finished until it has ended."""


class Quantizing:
    """Quantizes the float model of a run; a killed one goes on where it was.

    Args:
        context: of the run.
        sam: the float model.
        items: calibration pictures; none are needed where nothing is left to learn from them.
        scheme: the quantization.
        calibrated: of an earlier calibration, that is not done again.
        restart: start again where the journal is another run's, instead of refusing.

    Attributes:
        accuracy: what accuracy control did, once it was run.
        units: how each unit was reconstructed, once it was; the first process's only.
    """

    def __init__(
        self,
        context: RunContext,
        sam: Sam,
        items: Sequence[CalibrationItem],
        scheme: Scheme,
        calibrated: CalibratedState | None = None,
        restart: bool = False,
    ) -> None:
        self._context, self._settings = context, context.settings
        self._sam, self._items, self._scheme = sam, items, scheme
        self._calibrated, self._restart = calibrated, restart
        self._plan: Plan | None = None
        self.accuracy: AccuracyReport | None = None
        self.units: tuple[UnitRecord, ...] = ()

    def make_plan(self) -> Plan:
        """Plan what it will take, by a float forward of a picture, and tell of it."""
        if self._plan is None:
            self._plan = make_plan(
                self._sam,
                self._items,
                self._scheme,
                quantize_encoder=self._settings.quantize_encoder,
                budget=self._context.cache.budget,
            )
            for line in self._plan.lines():
                _log.info("%s", line)
        return self._plan

    def run(self, validation: Validation | None = None) -> QuantizedSam:
        """Quantize, going on with what the journal has if the run is to resume.

        Args:
            validation: where accuracy is controlled, if the settings say so.

        Raises:
            ConfigError: the journal belongs to another run; units of the scheme cannot be returned
                to more bits.
            CalibrationError: calibration data are not usable, or a unit diverged.
            ResourceError: memory or disk are used up; what was finished is in the journal.
        """
        if self._settings.accuracy is not None and validation is not None:
            require_levels(self._scheme)
        quantized = self._quantized(self._scheme, JOURNAL)
        if self._settings.accuracy is not None and validation is not None:
            self.accuracy = self._control(quantized, self._settings.accuracy, validation)
        return quantized

    def _quantized(self, scheme: Scheme, folder: str) -> QuantizedSam:
        settings = self._settings
        journal = None
        # A calibration of before without a reconstruction leaves nothing to lose.
        if parallel.is_first() and (self._calibrated is None or scheme.recon is not None):
            journal = self._journal(settings.work_dir / folder, scheme)
        quantized = quantize_sam(
            self._sam,
            self._items,
            scheme,
            quantize_encoder=settings.quantize_encoder,
            seed=settings.seed,
            progress=self._context.progress,
            cache=self._context.cache,
            journal=journal,
            plan=self._plan,
            calibrated=self._calibrated,
        )
        if journal is not None and folder == JOURNAL:
            self.units = unit_records(journal.parts)
        return quantized

    def _journal(self, folder: Path, scheme: Scheme) -> Journal:
        """What a killed run has finished, or a new one."""
        fingerprint = self._fingerprint(scheme)
        try:
            return Journal(folder, fingerprint, resume=self._settings.resume)
        except ConfigError as error:
            if not self._restart:
                raise
            _log.info("starting again: %s", error)
            shutil.rmtree(folder)
            return Journal(folder, fingerprint, resume=False)

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
