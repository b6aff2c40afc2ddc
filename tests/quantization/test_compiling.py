"""Whether, when and with what a kernel is compiled, and what happens where that fails."""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from torch import Tensor

from ptq4sam.quantization import fused
from ptq4sam.quantization.fused import FEWEST_ELEMENTS
from tests.quantization.compilers import compiler_failed, messages, needs_compiler, usable_compiler

pytestmark = pytest.mark.usefixtures("kernels")


def test_small_tensors_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compile(*_args: object, **_options: object) -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr(torch, "compile", no_compile)
    monkeypatch.setattr(fused._compiler, "_usable", {"cpu": True})
    run = fused.fused(lambda x: x + 1)
    assert run(torch.zeros(3)).tolist() == [1, 1, 1]
    with pytest.raises(AssertionError, match="compiled"):
        run(torch.zeros(FEWEST_ELEMENTS))


def test_a_kernel_is_made_when_the_time_it_takes_was_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    worth = fused.WORTH_COMPILING
    clock = iter([0.0, 0.75 * worth, 10.0, 10.0 + 0.3 * worth])
    monkeypatch.setattr(fused.time, "thread_time", lambda: next(clock))
    monkeypatch.setattr(torch, "compile", lambda function, **_options: lambda x: -function(x))
    monkeypatch.setattr(fused, "_compiler", usable_compiler())
    monkeypatch.delenv(fused.SWITCH)
    run = fused.fused(lambda x: x + 1)
    x = torch.zeros(FEWEST_ELEMENTS)
    assert [float(run(x)[0]) for _ in range(4)] == [1, 1, -1, -1]


def test_a_huge_tensor_is_compiled_for_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_options: lambda x: -function(x))
    monkeypatch.setattr(fused, "_compiler", usable_compiler())
    monkeypatch.setattr(fused, "LARGEST_UNCOMPILED", FEWEST_ELEMENTS)
    monkeypatch.delenv(fused.SWITCH)
    assert float(fused.fused(lambda x: x + 1)(torch.zeros(FEWEST_ELEMENTS))[0]) == -1


@pytest.mark.parametrize(("own", "expected"), [(None, True), (False, None)])
def test_the_compiler_is_not_tested_unless_the_user_wants_it(
    own: bool | None, expected: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[object] = []

    def remember(
        function: Callable[[Tensor], Tensor], options: dict[str, object], **_: object
    ) -> object:
        given.append(options.get("cpp.vec_isa_ok"))
        return function

    monkeypatch.setattr(torch, "compile", remember)
    monkeypatch.setattr(fused, "_compiler", usable_compiler())
    with torch._inductor.config.patch({"cpp.vec_isa_ok": own}):
        fused.fused(lambda x: x + 1)(torch.zeros(FEWEST_ELEMENTS))
    assert given == [expected]


_TO_POINTS = """
import torch
from ptq4sam.methods.granularity_points import point_parameters, to_points
from ptq4sam.quantization import fused
to_points(torch.rand(2**18), *point_parameters(torch.tensor(0.9), torch.tensor(4.0), 64))
print(torch.backends.cpu.get_cpu_capability(), fused._compiler._told)
"""


@needs_compiler
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="one set of vector instructions"
)
def test_kernels_on_disk_are_those_of_the_processor(tmp_path: Path) -> None:
    """torch takes one made for wider vectors, and half of what it gives was never computed."""
    told = []
    for capability in ("avx512", "avx2"):
        environment = {
            **os.environ,
            "ATEN_CPU_CAPABILITY": capability,
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
            fused.SWITCH: "1",
        }
        command = [sys.executable, "-c", _TO_POINTS]
        told.append(subprocess.run(command, env=environment, capture_output=True, text=True).stdout)
    assert told == ["AVX512 set()\n", "AVX2 set()\n"]


def test_a_failing_compiler_is_said_once_and_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(_function: object, **_options: object) -> Callable[[Tensor], Tensor]:
        def run(_x: Tensor) -> Tensor:
            raise compiler_failed("no g++ here")

        return run

    monkeypatch.setattr(torch, "compile", failing)
    monkeypatch.setattr(fused, "_compiler", usable_compiler())
    run = fused.fused(lambda x: x + 1)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert run(torch.zeros(FEWEST_ELEMENTS)).sum() == FEWEST_ELEMENTS
    (told,) = messages(caplog)
    assert "no kernel could be compiled" in told


@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps"])
def test_the_switch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", shutil.which("true") or "")
    monkeypatch.delenv(fused.SWITCH, raising=False)
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": False}
    assert fused._Compiler().usable(kind) is there[kind]
    monkeypatch.setenv(fused.SWITCH, "0")
    assert not fused._Compiler().usable(kind)


def test_a_gpu_needs_no_compiler_of_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "a-compiler-that-is-not-there")
    monkeypatch.delenv(fused.SWITCH, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    compiler = fused._Compiler()
    assert not compiler.usable("cpu")
    assert compiler.usable("cuda")
    compiler.give_up("cpu", RuntimeError("none"))
    assert compiler.usable("cuda")


def test_used_up_memory_is_not_a_missing_compiler(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries: list[Tensor] = []

    def full(_function: object, **_options: object) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            tries.append(x)
            if len(tries) > 1:
                return x + 1
            raise compiler_failed("CUDA out of memory. Tried to allocate")

        return run

    monkeypatch.setattr(torch, "compile", full)
    monkeypatch.setattr(fused, "_compiler", usable_compiler())
    run = fused.fused(lambda x: x + 1)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(torch.zeros(FEWEST_ELEMENTS))
    assert "no kernel" not in caplog.text
    run(torch.zeros(FEWEST_ELEMENTS))
    assert len(tries) == 2
