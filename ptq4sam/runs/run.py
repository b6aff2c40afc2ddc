"""Do one run: quantize where asked, prove it, evaluate, leave all in the work directory."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from typing import Any

from ptq4sam import parallel
from ptq4sam.evaluation import write_json
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.numerics import reproducible
from ptq4sam.progress import Progress, silent
from ptq4sam.runs.auditing import audit_run, require_passed
from ptq4sam.runs.evaluating import evaluate_run
from ptq4sam.runs.metrics import run_metrics
from ptq4sam.runs.needed import require_inputs
from ptq4sam.runs.outputs import make_folders, save_model
from ptq4sam.runs.parts import Parts
from ptq4sam.runs.quantizing import JOURNAL
from ptq4sam.runs.record import RunRecord
from ptq4sam.runs.reproducibility import fix_seeds
from ptq4sam.runs.run_log import ENDED
from ptq4sam.runs.settings import RunSettings
from ptq4sam.runs.work_dir import working_in

_log = logging.getLogger(__name__)


class Run:
    """One run of the framework; `execute` does it.

    Several processes (see `parallel`) do it together, and the first one writes.
    """

    def __init__(self, settings: RunSettings, progress: Progress = silent) -> None:
        self.settings = settings
        self._parts = Parts.of(settings, progress)

    @reproducible()
    def execute(self) -> dict[str, Any]:
        """Quantize, audit, evaluate, write; returns what metrics.json holds, or the plan.

        Raises:
            Ptq4samError: something that was asked for cannot be had; one line says what.
        """
        settings = self.settings
        require_inputs(settings)
        make_folders(settings)
        if settings.dry_run:
            return self._plan()
        with working_in(settings.work_dir):
            return self._execute()

    def _plan(self) -> dict[str, Any]:
        fix_seeds(self.settings.seed)
        plan = self._parts.models.plan()
        return {
            "plan": plan.lines(),
            "units": [dataclasses.asdict(unit) for unit in plan.units],
            "memory_budget": plan.budget,
        }

    def _execute(self) -> dict[str, Any]:
        settings, context = self.settings, self._parts.context
        fix_seeds(settings.seed)
        # First of all, for a mistake in it should not show after hours of quantization.
        data = self._parts.inputs.evaluated()
        models = self._parts.models.open()
        record = RunRecord(
            threshold=settings.show_threshold,
            distributions=models.distributions,
            units=models.units,
        )
        report = None
        # Layers on integers have no quantizers that could be watched.
        if isinstance(models.sam, QuantizedSam) and settings.backend == "torch":
            report = audit_run(context.phases, models.sam)
        if parallel.is_first():
            record = dataclasses.replace(record, file=save_model(context, models.sam))
        evaluation = None
        if data is not None:
            evaluation, scores, worst = evaluate_run(context, models, *data)
            record = dataclasses.replace(record, scores=scores, worst=worst)
        metrics = run_metrics(context, models, report, evaluation)
        if parallel.is_first():
            record.write(settings.work_dir)
            write_json(metrics, settings.work_dir / "metrics.json")
            # All that the journal was for is in the results now.
            shutil.rmtree(settings.work_dir / JOURNAL, ignore_errors=True)
            _log.info("%s: %s", ENDED, settings.work_dir / "metrics.json")
        if report is not None:
            require_passed(report, models.sam)
        return metrics
