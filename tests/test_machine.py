"""Cores and memory, as each system tells them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from ptq4sam import machine

PEAK = """
from ptq4sam.machine import forget_peak_memory, peak_memory
block = bytearray(200 * 2**20)
high = peak_memory()
del block
forget_peak_memory()
print(high, peak_memory())
"""


def test_memory_is_bytes() -> None:
    available = machine.available_memory()
    assert 2**26 < available <= psutil.virtual_memory().total
    assert 2**24 < machine.peak_memory() < psutil.virtual_memory().total


def test_the_peak_is_of_a_stage_where_the_system_can_forget() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", PEAK], env=environment, capture_output=True, text=True, check=True
    )
    high, then = map(int, done.stdout.split())
    assert high > 200 * 2**20
    if sys.platform == "linux":
        assert then < high - 150 * 2**20


def test_cores_are_those_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    if hasattr(os, "sched_getaffinity"):
        assert machine.cores() == len(os.sched_getaffinity(0))
    monkeypatch.setattr(machine.sys, "platform", "darwin")
    assert machine.cores() == psutil.cpu_count()


def test_other_systems_tell_the_peak_in_their_own_way(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine, "_STATUS", tmp_path / "none")
    usage = SimpleNamespace(
        RUSAGE_SELF=0, getrusage=lambda _who: SimpleNamespace(ru_maxrss=3 * 2**20)
    )
    monkeypatch.setitem(sys.modules, "resource", usage)
    assert machine.peak_memory() == 3 * 2**30  # KiB
    monkeypatch.setattr(machine.sys, "platform", "darwin")
    assert machine.peak_memory() == 3 * 2**20  # bytes
    # Windows has neither, but psutil knows it.
    monkeypatch.setattr(machine.sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "resource", None)
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=5))
    monkeypatch.setattr(psutil, "Process", lambda: process)
    assert machine.peak_memory() == 5
