"""What all parts of a run have in common."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ptq4sam import parallel
from ptq4sam.experiments.settings import RunSettings
from ptq4sam.experiments.stages import Stages
from ptq4sam.progress import Progress


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
        return cls(settings, progress, parallel.local_device(settings.torch_device()))
