"""What all parts of a run have in common."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch

from ptq4sam import parallel
from ptq4sam.deploy.cost import meta_sam
from ptq4sam.model.cache import ActivationCache
from ptq4sam.model.memory import working_bytes
from ptq4sam.progress import Progress
from ptq4sam.runs.settings import RunSettings
from ptq4sam.runs.stages import Stages


@dataclass(frozen=True)
class RunContext:
    """Settings of a run, where it computes, and who is told how far it is.

    Attributes:
        settings: what was asked for.
        progress: shows how far it is.
        device: where this process computes.
        stages: take time and memory of each part.
    """

    settings: RunSettings
    progress: Progress
    device: torch.device
    stages: Stages = field(default_factory=Stages)

    @classmethod
    def of(cls, settings: RunSettings, progress: Progress) -> RunContext:
        """The context of a run that begins.

        Raises:
            ConfigError: there is no such device here.
        """
        device = parallel.local_device(settings.torch_device())
        if device.type == "cuda":
            # Else whatever names no GPU would use the first one, in every process.
            torch.cuda.set_device(device)
        return cls(settings, progress, device)

    @functools.cached_property
    def cache(self) -> ActivationCache:
        """The one cache of the run: two would promise the same memory twice."""
        return ActivationCache(self.device, self._budget(), self.settings.work_dir, self._reserve())

    def _budget(self) -> int | None:
        """Bytes for activations on the device: none of a GPU's where the scheme says so."""
        scheme = self.settings.scheme
        recon = None if scheme is None else scheme.recon
        away = recon is not None and not recon.keep_gpu and self.device.type != "cpu"
        return 0 if away else self.settings.memory_budget

    def _reserve(self) -> int:
        """Bytes that the model at work needs beside them."""
        return (
            0 if self.device.type == "cpu" else working_bytes(meta_sam(self.settings.float_model))
        )
