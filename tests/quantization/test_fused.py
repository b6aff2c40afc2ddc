"""Compiled kernels: the same values as operations one by one, and a way back without a compiler."""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor

from ptq4sam.methods import granularity_points
from ptq4sam.methods.adaptive_granularity import AdaptiveGranularityQuantizer
from ptq4sam.operators import activation, norm
from ptq4sam.operators import attention as attention_operator
from ptq4sam.quantization import fused, grid, portable, rounding, whole
from ptq4sam.quantization import hard_numbers as hard
from ptq4sam.quantization.dropping import choose, keep_some_float
from ptq4sam.quantization.fused import FEWEST_ELEMENTS, fused_exactly
from ptq4sam.quantization.grid import Grid, fake_quantize, fake_quantize_some
from ptq4sam.quantization.rounding import AdaRoundQuantizer
from tests.devices import on_devices

SIDE = 1024
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")

Result = tuple[Tensor, ...]


pytestmark = pytest.mark.usefixtures("kernels")


def random_bits(x: Tensor) -> torch.Generator:
    return torch.Generator(x.device).manual_seed(3)


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the package said, without torch's own."""
    return [r.getMessage() for r in caplog.records if r.name.startswith("ptq4sam")]


def affine(x: Tensor) -> Result:
    scale = torch.tensor(0.21, device=x.device, requires_grad=True)
    output = fake_quantize(x, scale, x.new_tensor(7.0), Grid(4))
    return output, *torch.autograd.grad(output, (x, scale), torch.cos(output))


def affine_in_bfloat16(x: Tensor) -> Result:
    return affine(x.detach().bfloat16().requires_grad_())


def granularity() -> AdaptiveGranularityQuantizer:
    quantizer = AdaptiveGranularityQuantizer(Grid(4))
    quantizer.load_state_dict(
        {
            "scale": torch.tensor(0.02),
            "tau": torch.tensor(2.0),
            "calibrated": torch.tensor(True),
            "zero_point": torch.tensor(0.0),
        }
    )
    return quantizer


def granular(x: Tensor) -> Result:
    quantizer = granularity().to(x.device)
    attention = x.detach().softmax(-1).requires_grad_()
    output = quantizer(attention)
    gradients = torch.autograd.grad(output, (attention, quantizer.scale), torch.cos(output))
    return output, *gradients


def affine_with_some_float(x: Tensor) -> Result:
    scale = torch.tensor(0.21, device=x.device, requires_grad=True)
    choice = choose(x, 0.5, random_bits(x))
    output = fake_quantize_some(x, scale, x.new_tensor(7.0), Grid(4), choice)
    return output, *torch.autograd.grad(output, (x, scale), torch.cos(output))


def granular_with_some_float(x: Tensor) -> Result:
    attention = x.detach().softmax(-1).requires_grad_()
    quantizer = granularity().to(x.device)
    output = quantizer.quantize_some(attention, choose(x, 0.3, random_bits(x)))
    gradients = torch.autograd.grad(output, (attention, quantizer.scale), torch.cos(output))
    return output, *gradients


def granular_in_bfloat16(x: Tensor) -> Result:
    attention = x.detach().softmax(-1).bfloat16().requires_grad_()
    quantizer = granularity().to(x.device)
    output = quantizer.quantize_some(attention, choose(x, 0.5, random_bits(x)))
    gradients = torch.autograd.grad(output, (attention, quantizer.scale), torch.cos(output))
    return output, *gradients


def learned_rounding(x: Tensor) -> Result:
    quantizer = AdaRoundQuantizer(Grid(4), channel_axis=0).to(x.device)
    quantizer.observe(x.detach(), None)
    quantizer.begin_learning(x.detach())
    quantizer.alpha.requires_grad_()
    output = quantizer.quantize(x.detach())
    (output * x.detach()).sum().backward()
    quantizer.add_regularizer_gradient_(*x.detach().new_tensor([0.1, 3.7]))
    assert quantizer.alpha.grad is not None
    return output, quantizer.alpha.grad


def dropped(x: Tensor) -> Result:
    output = keep_some_float(x.detach().round(), x, 0.5, random_bits(x))
    return output, *torch.autograd.grad(output, (x,), torch.ones_like(output))


@on_devices
@needs_compiler
@pytest.mark.parametrize(
    "work",
    [
        affine,
        affine_in_bfloat16,
        affine_with_some_float,
        granular,
        granular_with_some_float,
        granular_in_bfloat16,
        learned_rounding,
        dropped,
    ],
)
def test_compiled_agrees_with_one_by_one(
    work: Callable[[Tensor], Result],
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    x = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0)).to(device)
    x.requires_grad_()
    assert x.numel() >= FEWEST_ELEMENTS
    monkeypatch.setattr(fused._compiler, "_usable", {device.type: False})
    expected = work(x)
    monkeypatch.setattr(fused._compiler, "_usable", {device.type: True})
    actual = work(x)
    assert not messages(caplog), "the compiler gave up, or a kernel was refused"
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=0)
    for ours, theirs in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@needs_compiler
def test_one_kernel_serves_all_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(2**20,), (2**10, 2**10), (1, 2**20), (2**20, 1), (3, 2**9, 2**10), (2**9, 1, 2**11)]
    shapes += [
        (1, 2**5, 2**5, 2**10),
        (25, 14, 14, 768),
        (2, 1, 2**9, 1, 2**10),
        (1,) * 6 + (2**21,),
    ]
    monkeypatch.setattr(fused._compiler, "_usable", {"cpu": True})
    kernels = torch._dynamo.utils.counters["stats"]
    before = kernels["unique_graphs"]
    for shape in shapes:
        x = torch.randn(shape).transpose(0, -1)
        found = fake_quantize(x, torch.tensor(0.3), torch.tensor(3.0), Grid(4))
        expected = ((x / 0.3).round().add(3).clamp(0, 15) - 3) * 0.3
        assert found.shape == x.shape
        torch.testing.assert_close(found, expected)
    # Far from the eight that torch keeps of a function.
    assert kernels["unique_graphs"] - before <= 2


def test_weights_of_all_convolutions_have_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """By groups, of 1 x 1 and of 3 x 3, and of linear layers, with a scale a channel."""
    seen: set[tuple[tuple[bool, ...], ...]] = set()

    def compile_of(function: Callable[..., Any], **_options: Any) -> Callable[..., Any]:
        def kernel(*args: Any) -> Any:
            kinds = (tuple(n == 1 for n in x.shape) for x in args if isinstance(x, Tensor))
            seen.add(tuple(kinds))
            return function(*args)

        return kernel

    monkeypatch.setattr(torch, "compile", compile_of)
    monkeypatch.setattr(fused, "_compiler", usable_compiler())
    work = fused.fused(grid._gradients.__wrapped__)
    steps = fused.fused(grid._steps_from_zero.__wrapped__)
    generator = torch.Generator().manual_seed(2)
    shapes = [(512, 512, 1, 1), (2**15, 1, 3, 3), (64, 512, 3, 3), (2**14, 32, 1, 1)]
    for shape in [*shapes, (2**13, 32, 5, 1), (512, 512), (2**15, 1, 9)]:
        x = torch.randn(shape, generator=generator)
        gradient = torch.randn(shape, generator=generator)
        scale = torch.rand(len(x), generator=generator).add(0.1).reshape(-1, *[1] * (x.dim() - 1))
        zero = torch.zeros_like(scale)
        expected = (x / scale).round().clamp(-8, 7)
        found = steps(x, scale, zero, -8, 7)
        assert found.shape == x.shape
        assert found.equal(expected)
        for_x, for_scale = work(x, gradient, scale, zero, -8, 7)
        inside = ((x / scale).round() == expected).float()
        assert for_x.equal(inside * gradient)
        of_rows = ((expected - inside * x / scale) * gradient).double()
        assert for_scale.shape == scale.shape
        torch.testing.assert_close(
            for_scale.flatten().double(), of_rows.flatten(1).sum(1), rtol=1e-5, atol=1e-4
        )
    # Of each function one.
    assert len(seen) == 2


@needs_compiler
def test_parameters_of_all_sizes_have_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Biases are parameters: a model has layers of more widths than torch keeps kernels."""
    monkeypatch.setattr(fused, "_compiler", usable_compiler())
    rescaled = fused_exactly(whole._hard_sums)(whole._rescaled.__wrapped__)
    kernels = torch._dynamo.utils.counters["stats"]
    before = kernels["unique_graphs"]
    for width in range(32, 320, 32):
        sums = torch.randint(-1000, 1000, (2**14, width)).float()
        scale, bias = torch.rand(width), torch.nn.Parameter(torch.randn(width))
        with torch.no_grad():
            assert rescaled(sums, scale, bias).equal(sums * scale + bias)
    assert kernels["unique_graphs"] - before <= 2
    assert fused.compiles(torch.device("cpu"))


@needs_compiler
def test_a_function_of_too_many_kernels_leaves_others_theirs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def times(x: Tensor, factor: int, power: float) -> Tensor:
        return x * factor**power

    monkeypatch.setattr(fused, "_compiler", usable_compiler())
    run = fused.fused(times)
    x = torch.ones(FEWEST_ELEMENTS)
    with torch._dynamo.config.patch(recompile_limit=2), caplog.at_level("WARNING"):
        for step in range(5):
            assert run(x, 2, step / 2).equal(times(x, 2, step / 2))
    assert fused.compiles(torch.device("cpu"))
    assert messages(caplog) == []


def usable_compiler() -> fused._Compiler:
    compiler = fused._Compiler()
    compiler._usable["cpu"] = True
    return compiler


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
            raise torch._dynamo.exc.BackendCompilerFailed(
                lambda: None, RuntimeError("no g++ here"), None
            )

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


def test_one_kernel_of_adaptive_granularity_serves_all_shapes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """More shapes than torch.compile makes kernels for: else it gives up for the whole process."""
    quantizer = AdaptiveGranularityQuantizer(Grid(4))
    quantizer._set_parameters(torch.tensor(0.7), torch.tensor(0.0))
    flat = torch.rand(FEWEST_ELEMENTS, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = [
            function(flat) for function in (quantizer.quantize, quantizer.steps, quantizer.codes)
        ]
        for axes in range(2, 14):
            x = flat.reshape(*(2,) * (axes - 1), -1)
            assert torch.equal(quantizer.quantize(x).flatten(), expected[0])
            assert torch.equal(quantizer.steps(x).flatten(), expected[1])
            assert torch.equal(quantizer.codes(x).flatten(), expected[2])
    assert "no kernel could be compiled" not in caplog.text


def test_used_up_memory_is_not_a_missing_compiler(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries: list[Tensor] = []

    def full(_function: object, **_options: object) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            tries.append(x)
            if len(tries) > 1:
                return x + 1
            raise torch._dynamo.exc.BackendCompilerFailed(
                lambda: None, RuntimeError("CUDA out of memory. Tried to allocate"), None
            )

        return run

    monkeypatch.setattr(torch, "compile", full)
    monkeypatch.setattr(fused, "_compiler", usable_compiler())
    run = fused.fused(lambda x: x + 1)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(torch.zeros(FEWEST_ELEMENTS))
    assert "no kernel" not in caplog.text
    run(torch.zeros(FEWEST_ELEMENTS))
    assert len(tries) == 2


def test_a_kernel_with_other_numbers_is_said_once_and_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of its device alone: kernels of functions that are not compared go on."""
    monkeypatch.setattr(fused, "_compiler", usable_compiler())
    # A compiler that is off by one in a single place of the second set of arguments.
    calls: list[Tensor] = []

    def compiled(function: Callable[[Tensor], Tensor], **_options: object) -> object:
        def run(x: Tensor) -> Tensor:
            calls.append(x)
            result = function(x)
            if x[0] == 2:
                result[-1] += 1
            return result

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    arguments = fused_exactly(lambda _x: iter([(torch.ones(5),), (torch.full((5,), 2.0),)]))
    exact, plain = arguments(torch.square), fused.fused(torch.square)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(exact(torch.ones(FEWEST_ELEMENTS)), torch.ones(FEWEST_ELEMENTS))
        assert len(calls) == 2
        arguments(torch.square)(torch.ones(FEWEST_ELEMENTS))
        plain(torch.ones(FEWEST_ELEMENTS))
    assert len(calls) == 5
    (told,) = messages(caplog)
    assert "gives other numbers on cpu" in told


def test_what_is_no_number_is_equal_to_itself() -> None:
    nan = torch.tensor([1.0, torch.nan])
    assert fused._same(nan, nan.clone())
    assert not fused._same(nan, torch.ones(2))
    assert not fused._same(torch.ones(2), nan)


def flat_calls() -> dict[str, tuple[object, Callable[..., Tensor], tuple[object, ...]]]:
    """Each function whose kernel is compared: its module, and arguments of a call."""
    x, attention = torch.zeros(2**21), torch.zeros(2**21)
    number = torch.tensor
    points = granularity_points.point_parameters(number(0.7), number(2.0), 16)
    scale, middles = points[:2]
    some = choose(x, 0.5, None)
    rows, channels = torch.zeros(4096, 512), torch.zeros(512)
    affine_parameters = (number(0.21), number(7.0), 0, 255)
    chosen_affine = (*some.parts(), *affine_parameters[:2], x.new_empty(()), 0, 255)
    weight = torch.zeros(1024, 1024)
    by_channel = (torch.full((1024, 1), 0.3), torch.full((1024, 1), 7.0))
    points_of_some = (*some.parts(), *points, x.new_empty(()))
    return {
        "affine": (grid, grid._move_to_grid, (x, *affine_parameters)),
        "steps": (grid, grid._steps_from_zero, (x, *affine_parameters)),
        "weights": (grid, grid._move_to_grid, (weight, *by_channel, 0, 15)),
        "some": (grid, grid._move_some_to_grid, (some.rows(x), *chosen_affine)),
        "rounding": (
            rounding,
            rounding._soften,
            (weight, weight.clone(), *by_channel, weight.new_empty(()), 0, 15),
        ),
        "codes": (
            granularity_points,
            granularity_points._clamped_codes,
            (attention, scale, middles, number(2, dtype=torch.int32), 16),
        ),
        "points": (granularity_points, granularity_points._to_points, (attention, *points)),
        "whole points": (
            granularity_points,
            granularity_points._whole_points,
            (attention, *points, number(2.0**20)),
        ),
        "some points": (
            granularity_points,
            granularity_points._quantize_some,
            (some.rows(attention), *points_of_some),
        ),
        "softmax": (portable, attention_operator._softmax, (rows, rows[:, :1])),
        "gelu": (portable, activation._gelu, (x,)),
        "norm": (portable, norm._norm_of_rows, (rows, channels, channels, 1e-6)),
        "rescaled": (whole, whole._rescaled, (rows, channels, channels)),
    }


def hard_arguments(function: Callable[..., Tensor]) -> Callable[..., object]:
    """What a function of the package names as hard to round."""
    while fused_by := getattr(function, "__wrapped__", None):
        # What is `unwatched` is wrapped once more.
        if any(isinstance(c.cell_contents, fused._Kernel) for c in function.__closure__ or ()):
            break
        function = fused_by
    (kernel,) = (
        cell.cell_contents
        for cell in function.__closure__ or ()
        if isinstance(cell.cell_contents, fused._Kernel)
    )
    assert kernel._hard is not None
    return kernel._hard


@pytest.mark.parametrize("name", list(flat_calls()))
def test_hard_numbers_show_a_kernel_that_does_not_round_right(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By quotients as products with reciprocals, and by products and sums rounded once."""
    module, function, arguments = flat_calls()[name]
    makes, plain = hard_arguments(function), function.__wrapped__  # type: ignore[attr-defined]
    sets = list(makes(*arguments))  # type: ignore[call-overload]
    assert sum(given[0].numel() for given in sets) >= 2**19
    for given in sets:
        assert [type(x) for x in given] == [type(x) for x in arguments]
    expected = [plain(*given) for given in sets]
    assert all(map(fused._same, [plain(*given) for given in sets], expected))
    if name == "rescaled":
        found = [
            (sums.double() * scale.double() + bias.double()).float() for sums, scale, bias in sets
        ]
    elif module is portable:
        monkeypatch.setattr(
            portable, "reciprocal", lambda x: x.double().pow(-1).mul(1 + 2e-8).float()
        )
        found = [plain(*given) for given in sets]
    else:
        monkeypatch.setattr(module, "divided", lambda x, divisor: x * divisor.reciprocal())
        found = [plain(*given) for given in sets]
    assert not all(map(fused._same, found, expected))


@needs_compiler
def test_a_kernel_that_divides_approximately_is_caught(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def approximately(x: Tensor, divisor: Tensor) -> Tensor:
        return x * divisor.reciprocal() if torch.compiler.is_compiling() else x / divisor

    monkeypatch.setattr(fused, "_compiler", usable_compiler())
    monkeypatch.setattr(grid, "divided", approximately)
    steps = fused_exactly(hard.near_steps(scale_at=1))(grid._steps_from_zero.__wrapped__)  # type: ignore[attr-defined]
    x = torch.arange(FEWEST_ELEMENTS).float() * 0.9375
    with caplog.at_level(logging.WARNING):
        found = steps(x, torch.tensor(0.9375), torch.tensor(0.0), 0, 65_535)
    assert torch.equal(found, torch.arange(FEWEST_ELEMENTS).clamp(max=65_535).float())
    assert "gives other numbers on cpu" in caplog.text


@on_devices
def test_quotients_of_whole_steps_are_whole(device: torch.device) -> None:
    """4.6875 / 0.9375 is 5 (triton issue 10661); a floor of anything less would be a step off."""
    codes = torch.arange(FEWEST_ELEMENTS, device=device).float()
    for scale in (0.9375, 0.21, 1e-3):
        x = codes * scale
        exactly = (x.double() / torch.tensor(scale).double().to(device)).round().float()
        zero = x.new_zeros(())
        with torch.no_grad():
            found = grid.steps_from_zero(x, x.new_tensor(scale), zero, Grid(16))
        assert torch.equal(found, exactly.clamp(max=65_535))
