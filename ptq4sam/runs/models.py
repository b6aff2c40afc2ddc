"""The models of a run: loaded from their files, or quantized."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ptq4sam import parallel
from ptq4sam.deploy.backends import TORCH, open_backend
from ptq4sam.deploy.container import is_quantized_file
from ptq4sam.deploy.exported import ExportedSam
from ptq4sam.deploy.manifest import origin
from ptq4sam.deploy.storage import load
from ptq4sam.errors import CheckpointError, ConfigError
from ptq4sam.families import variant_of
from ptq4sam.families.checkpoint import load_sam
from ptq4sam.model.distributions import Distributions
from ptq4sam.model.plan import Plan
from ptq4sam.quantization.scheme import STUDY
from ptq4sam.runs.accuracy import AccuracyReport
from ptq4sam.runs.context import RunContext
from ptq4sam.runs.inputs import Inputs
from ptq4sam.runs.quantizing import Quantizing
from ptq4sam.runs.record import UnitRecord
from ptq4sam.runs.settings import DEFAULT_MODEL
from ptq4sam.sam.model import PromptableModel, Sam

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunModels:
    """The models of a run.

    Attributes:
        sam: the evaluated one.
        reference: the float one to compare it with, where it is at hand.
        accuracy: what accuracy control did; None where there was none.
        distributions: what the quantizers see; None where nothing was quantized, and in all
            processes but the first.
        units: how each unit was reconstructed, if it was; the first process's only.
    """

    sam: PromptableModel
    reference: PromptableModel | None
    accuracy: AccuracyReport | None = None
    distributions: Distributions | None = None
    units: tuple[UnitRecord, ...] = ()


class ModelOpener:
    """Opens the models that a run's settings ask for."""

    def __init__(self, context: RunContext, inputs: Inputs) -> None:
        self._context, self._settings = context, context.settings
        self._inputs, self._phases = inputs, context.phases

    def open(self) -> RunModels:
        """Load the models, and quantize where a scheme is asked for.

        Raises:
            CheckpointError: a file is not what it was taken for.
            ConfigError: files and settings do not go together.
            CalibrationError: calibration data are not usable, or a unit diverged.
            ResourceError: memory or disk are used up; what was finished is in the journal.
        """
        settings = self._settings
        checkpoint = settings.checkpoint
        if checkpoint is not None and (settings.backend != TORCH or is_quantized_file(checkpoint)):
            return self._stored(checkpoint)
        if settings.float_checkpoint is not None:
            raise ConfigError(
                f"a float checkpoint is what a quantized model is compared with, but "
                f"{settings.checkpoint or settings.float_model} is not quantized"
            )
        sam = self.float_sam()
        return RunModels(sam, None) if settings.scheme is None else self._quantized(sam)

    def plan(self) -> Plan:
        """What the quantization will take; errors as `open`."""
        return self._prepare(self.float_sam()).make_plan()

    def float_sam(self) -> Sam:
        """The float model.

        Raises:
            CheckpointError: its file is not what it was taken for.
        """
        settings = self._settings
        folded = settings.scheme is None or settings.scheme.compat != STUDY
        key = (settings.float_model, settings.checkpoint, self._context.device)
        with self._phases.phase("load"):
            load = partial(load_sam, *key, folded=folded)
            return self._context.opened.get("model", (*key, folded), load)

    def _quantized(self, sam: Sam) -> RunModels:
        validation = self._inputs.validation()
        quantizing = self._prepare(sam)
        with self._phases.phase("quantize"):
            quantized = quantizing.run(validation)
        if not parallel.is_first():
            return RunModels(quantized, sam, quantizing.accuracy)
        with self._phases.phase("distributions"):
            seen = quantizing.distributions(quantized)
        return RunModels(quantized, sam, quantizing.accuracy, seen, quantizing.units)

    def _prepare(self, sam: Sam) -> Quantizing:
        settings = self._settings
        if settings.scheme is None:
            raise ValueError("only a run with a scheme quantizes")
        quantizing = Quantizing(self._context, sam, self._inputs.calibration(sam), settings.scheme)
        with self._phases.phase("plan"):
            quantizing.make_plan()
        return quantizing

    def _stored(self, checkpoint: Path) -> RunModels:
        """A quantized or exported model."""
        settings = self._settings
        if settings.scheme is not None:
            raise ConfigError(
                f"{checkpoint} is quantized already, so a scheme has no meaning: "
                "leave it away, or give float weights"
            )
        with self._phases.phase("load"):
            model = open_model(
                settings.model,
                checkpoint,
                self._context.device,
                settings.backend,
                settings.precision,
            )
            made_of = model.manifest.origin if isinstance(model, ExportedSam) else origin(model)
            return RunModels(model, self._origin(model.name, made_of))

    def _origin(self, name: str, made_of: str) -> Sam | None:
        """The float model that a quantized one was made of, where it is at hand."""
        path = self._settings.float_checkpoint
        embedded = variant_of(name).weights.embedded
        if path is None and (embedded is None or not embedded.is_file()):
            return None
        sam = load_sam(name, path, device=self._context.device)
        if origin(sam) == made_of:
            return sam
        if path is not None:
            raise CheckpointError(
                f"{self._settings.checkpoint} was not made of {path}: give the float weights that "
                "were quantized, or none"
            )
        _log.info("no agreement: the model was made of other weights than the embedded ones")
        return None


def open_model(
    name: str | None,
    checkpoint: Path | None,
    device: torch.device,
    backend: str = TORCH,
    precision: str = "f32",
) -> Sam | ExportedSam:
    """A float, quantized or exported SAM.

    Args:
        name: of the SAM; None for that of a quantized or exported one, else `DEFAULT_MODEL`.
        checkpoint: its file or folder; None for the embedded weights.
        device: where torch computes.
        backend: what runs it, see `open_backend`.
        precision: under OpenVINO, see `open_backend`.

    Raises:
        CheckpointError: the file does not fit, or is missing.
        ConfigError: there is no such model, or a backend has nothing to run.
    """
    if backend == TORCH and (checkpoint is None or not is_quantized_file(checkpoint)):
        return load_sam(name or DEFAULT_MODEL, checkpoint, device=device)
    if checkpoint is None:
        raise ConfigError(
            f"backend {backend} runs what is quantized or exported already: give a checkpoint"
        )
    sam = (
        load(checkpoint, device)
        if backend == TORCH
        else open_backend(checkpoint, backend, precision)
    )
    if name not in (None, sam.name):
        raise CheckpointError(
            f"asked for {name}, but {checkpoint} is a quantized {sam.name}: give another file, "
            "or leave the model's name away"
        )
    return sam
