"""Seconds and peak memory of each stage of a run."""

from __future__ import annotations

import contextlib
import logging
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

_log = logging.getLogger(__name__)
_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Stage:
    """What one stage took: wall seconds, highest resident bytes, highest CUDA bytes."""

    seconds: float
    peak_memory_bytes: int
    peak_cuda_bytes: int


@dataclass
class Stages:
    """The stages of a run by name, in order."""

    done: dict[str, Stage] = field(default_factory=dict)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the `with` block under a name."""
        _log.info("%s ...", name)
        _reset_peak()
        started = time.monotonic()
        yield
        stage = Stage(time.monotonic() - started, _peak_memory(), _peak_cuda())
        self.done[name] = stage
        _log.info("%s: %.1f s, peak %.2f GiB", name, stage.seconds, stage.peak_memory_bytes / 2**30)

    def to_dict(self) -> dict[str, dict[str, float]]:
        """For metrics.json."""
        return {name: asdict(stage) for name, stage in self.done.items()}


def _reset_peak() -> None:
    """Start the peak anew where the system can (Linux: writing 5 to clear_refs)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if _CLEAR_REFS.exists():
        with contextlib.suppress(OSError):
            _CLEAR_REFS.write_text("5")


def _peak_memory() -> int:
    """Highest resident size in bytes since `_reset_peak`, or of the process where it cannot."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _peak_cuda() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
