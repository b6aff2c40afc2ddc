"""Seconds and peak memory of each phase of a run."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import torch

from ptq4sam.machine import forget_peak_memory, peak_memory

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Phase:
    """What one phase took: wall seconds, highest resident bytes, highest CUDA bytes."""

    seconds: float
    peak_memory_bytes: int
    peak_cuda_bytes: int


@dataclass
class Phases:
    """The phases of a run by name, in order."""

    done: dict[str, Phase] = field(default_factory=dict)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the `with` block under a name."""
        _log.info("%s ...", name)
        _forget_peaks()
        started = time.monotonic()
        yield
        took = Phase(time.monotonic() - started, peak_memory(), _peak_cuda())
        self.done[name] = took
        _log.info("%s: %.1f s, peak %.2f GiB", name, took.seconds, took.peak_memory_bytes / 2**30)

    def to_dict(self) -> dict[str, dict[str, float]]:
        """For metrics.json."""
        return {name: asdict(took) for name, took in self.done.items()}


def _forget_peaks() -> None:
    forget_peak_memory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak_cuda() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
