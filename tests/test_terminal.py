"""Errors that a user can mend are one line; others are not hidden."""

from __future__ import annotations

import errno

import pytest
import torch

from ptq4sam.terminal import guarded


def test_system_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fill_disk() -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.json")

    assert guarded(fill_disk) == 2
    assert capsys.readouterr().err == "error: metrics.json: No space left on device\n"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to..."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
    ],
)
def test_out_of_memory_names_the_knob(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise error

    assert guarded(fail) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: out of memory")
    assert "--memory-budget" in told
    assert told.count("\n") == 1


def test_other_runtime_errors_are_not_hidden() -> None:
    def fail() -> int:
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        guarded(fail)
