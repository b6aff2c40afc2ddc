"""Errors that a user can mend are one line; others are not hidden."""

from __future__ import annotations

import errno
import os
import signal

import pytest
import torch

from ptq4sam import extensions
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
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_out_of_memory_names_the_knob(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise error

    assert guarded(fail) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: out of memory")
    assert "memory budget" in told
    assert ("expandable_segments:True" in told) is ("CU" in str(error))
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    "message", ["shape mismatch", "CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLt"]
)
def test_other_runtime_errors_are_not_hidden(message: str) -> None:
    def fail() -> int:
        raise RuntimeError(message)

    with pytest.raises(RuntimeError, match=message):
        guarded(fail)


@pytest.mark.parametrize("error", [NameError, RuntimeError])
@pytest.mark.parametrize("verbose", [False, True])
def test_errors_in_code_of_extensions_are_one_line(
    error: type[Exception],
    verbose: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Mine:
        def hook(self) -> int:
            raise error("a mistake\nof mine")

    # As if it were in a module of its own.
    monkeypatch.setattr(extensions, "_REGISTERED", {Mine: "method mine"})
    line = Mine.hook.__code__.co_firstlineno + 1
    assert guarded(Mine().hook, verbose) == 2
    told = capsys.readouterr().err
    end = f"test_terminal.py:{line}): {error.__name__}: a mistake of mine\n"
    assert told.endswith(end)
    last = told.splitlines()[-1]
    assert last.startswith("error: method mine (")
    assert ("where it happened" in told) is verbose
    assert verbose or told.count("\n") == 1


@pytest.mark.parametrize(
    ("number", "status", "told"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "ended")],
)
def test_how_an_interrupted_command_goes_on(
    number: signal.Signals, status: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)

    def interrupt() -> int:
        os.kill(os.getpid(), number)
        return 0

    assert guarded(interrupt) == status
    assert capsys.readouterr().err == f"{told}\n"
    assert guarded(interrupt, goes_on="the same command goes on") == status
    assert capsys.readouterr().err == f"{told}: the same command goes on\n"
    assert signal.getsignal(number) is before
