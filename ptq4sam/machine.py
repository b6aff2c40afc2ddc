"""What this machine has for us, on every system: cores, free memory, and how much we used."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import psutil

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def cores() -> int:
    """Cores that this process may use."""
    process = psutil.Process()
    # macOS has no such thing.
    if sys.platform != "darwin" and hasattr(process, "cpu_affinity"):
        return len(process.cpu_affinity())
    return psutil.cpu_count() or 1


def available_memory() -> int:
    """Bytes of memory that can be had without swapping."""
    return int(psutil.virtual_memory().available)


def forget_peak_memory() -> None:
    """Let `peak_memory` begin anew where the system can: Linux, by writing 5 to clear_refs."""
    if _CLEAR_REFS.exists():
        with contextlib.suppress(OSError):
            _CLEAR_REFS.write_text("5", encoding="ascii")


def peak_memory() -> int:
    """Highest resident bytes since `forget_peak_memory`, or of the process where it cannot."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    if _STATUS.exists():
        for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    # Not at the top: Windows has no such module.
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
