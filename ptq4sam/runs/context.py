"""What all parts of a run have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from ptq4sam import parallel
from ptq4sam.deploy.cost import meta_sam
from ptq4sam.families.checkpoint import image_size_of
from ptq4sam.model.cache import ActivationCache
from ptq4sam.model.memory import free_memory, working_bytes
from ptq4sam.progress import Progress
from ptq4sam.runs.phases import Phases
from ptq4sam.runs.settings import RunSettings

T = TypeVar("T")


class Opened:
    """Models, data sets and the like that one run opened and the next may use again.

    Args:
        most: how many of each kind; a run that is the only one needs none.
    """

    def __init__(self, most: int = 0) -> None:
        self._most = most
        self._kinds: dict[str, dict[Any, Any]] = {}

    def get(self, kind: str, key: Any, make: Callable[[], T]) -> T:
        """What was made before under a key, or is made now; the last ones of a kind stay."""
        entries = self._kinds.setdefault(kind, {})
        entry: T = entries.pop(key) if key in entries else make()
        entries[key] = entry
        while len(entries) > self._most:
            entries.pop(next(iter(entries)))
        return entry

    def clear(self) -> None:
        """Let go of everything."""
        self._kinds.clear()


@dataclass(frozen=True)
class RunContext:
    """Settings of a run, where it computes, and who is told how far it is.

    Attributes:
        settings: what was asked for.
        progress: shows how far it is.
        device: where this process computes.
        phases: take time and memory of each part.
        opened: by earlier runs of this process, or by this one.
        sharers: how many runs share the device's memory, this one included.
    """

    settings: RunSettings
    progress: Progress
    device: torch.device
    phases: Phases = field(default_factory=Phases)
    opened: Opened = field(default_factory=Opened)
    sharers: int = 1

    @classmethod
    def of(cls, settings: RunSettings, progress: Progress, **more: Any) -> RunContext:
        """The context of a run that begins; `more` are further fields.

        Raises:
            ConfigError: there is no such device here.
        """
        device = parallel.local_device(settings.torch_device())
        if device.type == "cuda":
            # Else whatever names no GPU would use the first one, in every process.
            torch.cuda.set_device(device)
        return cls(settings, progress, device, **more)

    @functools.cached_property
    def cache(self) -> ActivationCache:
        """The one cache of the run: two would promise the same memory twice."""
        reserve = self._reserve()
        return ActivationCache(self.device, self._budget(reserve), self.settings.work_dir, reserve)

    def _budget(self, reserve: int) -> int | None:
        """Bytes for activations on the device: none of a GPU's where the scheme says so."""
        scheme = self.settings.scheme
        recon = None if scheme is None else scheme.recon
        if recon is not None and not recon.keep_gpu and self.device.type != "cpu":
            return 0
        if self.sharers > 1 and self.settings.memory_budget is None:
            return max(0, free_memory(self.device) - reserve) // (2 * self.sharers)
        return self.settings.memory_budget

    def _reserve(self) -> int:
        """Bytes that the model at work needs beside them: of the side that its weights are for."""
        if self.device.type == "cpu":
            return 0
        name = self.settings.float_model
        side = image_size_of(name, self.settings.checkpoint)
        return working_bytes(meta_sam(name, image_size=side))
