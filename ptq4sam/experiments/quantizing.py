"""The quantization of a run: calibration pictures, plan, journal, memory budget."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ptq4sam import parallel
from ptq4sam.experiments.settings import RunSettings
from ptq4sam.model.cache import ActivationCache
from ptq4sam.model.calibration import CalibrationItem
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.model.journal import Journal, run_fingerprint
from ptq4sam.model.plan import Plan, make_plan
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.progress import Progress
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam

_log = logging.getLogger(__name__)

JOURNAL = "journal"
"""Folder in the work directory that holds what a run has finished until it has ended."""


class Quantizing:
    """Quantizes the float model of a run; a killed one goes on where it was."""

    def __init__(
        self,
        settings: RunSettings,
        sam: Sam,
        items: Sequence[CalibrationItem],
        scheme: Scheme,
        progress: Progress,
    ) -> None:
        self._settings, self._sam, self._items, self._scheme = settings, sam, items, scheme
        self._progress = progress
        self._cache = ActivationCache(sam.device, self._budget(), settings.work_dir)
        self.plan: Plan = make_plan(
            sam,
            items,
            scheme,
            quantize_encoder=settings.quantize_encoder,
            budget=self._cache.budget,
        )
        for line in self.plan.lines():
            _log.info("%s", line)

    def _budget(self) -> int | None:
        """Bytes for activations on the model's device: none of a GPU's where the scheme says so."""
        recon = self._scheme.recon
        away = recon is not None and not recon.keep_gpu and self._sam.device.type != "cpu"
        return 0 if away else self._settings.memory_budget

    def run(self) -> QuantizedSam:
        """Quantize, going on with what the journal has if the run is to resume.

        Raises:
            ConfigError: the journal belongs to another run.
            CalibrationError: calibration data are not usable, or a unit diverged.
            ResourceError: memory or disk are used up; what was finished is in the journal.
        """
        settings = self._settings
        journal = None
        if parallel.is_first():
            fingerprint = run_fingerprint(
                self._sam,
                self._items,
                self._scheme,
                quantize_encoder=settings.quantize_encoder,
                seed=settings.seed,
            )
            journal = Journal(settings.work_dir / JOURNAL, fingerprint, resume=settings.resume)
        return quantize_sam(
            self._sam,
            self._items,
            self._scheme,
            quantize_encoder=settings.quantize_encoder,
            seed=settings.seed,
            progress=self._progress,
            cache=self._cache,
            journal=journal,
            plan=self.plan,
        )
