"""What tests of compiled kernels share."""

import shutil

import pytest
import torch

from ptq4sam.quantization import fused

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the package said, without torch's own."""
    return [r.getMessage() for r in caplog.records if r.name.startswith("ptq4sam")]


def usable_compiler() -> fused._Compiler:
    compiler = fused._Compiler()
    compiler._usable["cpu"] = True
    return compiler


def compiler_failed(reason: str) -> Exception:
    """What torch raises where a kernel cannot be made."""
    return torch._dynamo.exc.BackendCompilerFailed(lambda: None, RuntimeError(reason), None)
