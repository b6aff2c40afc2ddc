"""Compiled kernels: the same values as operations one by one, and a way back without a compiler."""

import logging
import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ptq4sam.methods.adaptive_granularity import AdaptiveGranularityQuantizer
from ptq4sam.quantization import fused
from ptq4sam.quantization.dropping import choose, keep_some_float
from ptq4sam.quantization.fused import FEWEST_ELEMENTS
from ptq4sam.quantization.grid import Grid, fake_quantize, fake_quantize_some
from ptq4sam.quantization.rounding import AdaRoundQuantizer

SIDE = 1024
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")

Result = tuple[Tensor, ...]


def affine(x: Tensor) -> Result:
    scale = torch.tensor(0.21, requires_grad=True)
    output = fake_quantize(x, scale, torch.tensor(7.0), Grid(4))
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
    quantizer = granularity()
    attention = x.detach().softmax(-1).requires_grad_()
    output = quantizer(attention)
    gradients = torch.autograd.grad(output, (attention, quantizer.scale), torch.cos(output))
    return output, *gradients


def affine_with_some_float(x: Tensor) -> Result:
    scale = torch.tensor(0.21, requires_grad=True)
    choice = choose(x, 0.5, torch.Generator().manual_seed(3))
    output = fake_quantize_some(x, scale, torch.tensor(7.0), Grid(4), choice)
    return output, *torch.autograd.grad(output, (x, scale), torch.cos(output))


def granular_with_some_float(x: Tensor) -> Result:
    attention = x.detach().softmax(-1).requires_grad_()
    quantizer = granularity()
    output = quantizer.quantize_some(attention, choose(x, 0.3, torch.Generator().manual_seed(3)))
    gradients = torch.autograd.grad(output, (attention, quantizer.scale), torch.cos(output))
    return output, *gradients


def granular_in_bfloat16(x: Tensor) -> Result:
    attention = x.detach().softmax(-1).bfloat16().requires_grad_()
    quantizer = granularity()
    output = quantizer.quantize_some(attention, choose(x, 0.5, torch.Generator().manual_seed(3)))
    gradients = torch.autograd.grad(output, (attention, quantizer.scale), torch.cos(output))
    return output, *gradients


def rounding(x: Tensor) -> Result:
    quantizer = AdaRoundQuantizer(Grid(4), channel_axis=0)
    quantizer.observe(x.detach(), None)
    quantizer.begin_learning(x.detach())
    quantizer.alpha.requires_grad_()
    output = quantizer.quantize(x.detach())
    (output * x.detach()).sum().backward()
    quantizer.add_regularizer_gradient_(0.1, 3.7)
    assert quantizer.alpha.grad is not None
    return output, quantizer.alpha.grad


def dropped(x: Tensor) -> Result:
    output = keep_some_float(x.detach().round(), x, 0.5, torch.Generator().manual_seed(3))
    return output, *torch.autograd.grad(output, (x,), torch.ones_like(output))


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
        rounding,
        dropped,
    ],
)
def test_compiled_agrees_with_one_by_one(
    work: Callable[[Tensor], Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert x.numel() >= FEWEST_ELEMENTS
    monkeypatch.setattr(fused._compiler, "_usable", False)
    expected = work(x)
    monkeypatch.setattr(fused._compiler, "_usable", True)
    actual = work(x)
    assert fused._compiler.usable(), "the compiler gave up"
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
    monkeypatch.setattr(fused._compiler, "_usable", True)
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


def test_small_tensors_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compile(*_args: object, **_options: object) -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr(torch, "compile", no_compile)
    monkeypatch.setattr(fused._compiler, "_usable", True)
    run = fused.fused(lambda x: x + 1)
    assert run(torch.zeros(3)).tolist() == [1, 1, 1]
    with pytest.raises(AssertionError, match="compiled"):
        run(torch.zeros(FEWEST_ELEMENTS))


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
    monkeypatch.setattr(fused, "_compiler", fused._Compiler())
    monkeypatch.setattr(fused._compiler, "_usable", True)
    run = fused.fused(lambda x: x + 1)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert run(torch.zeros(FEWEST_ELEMENTS)).sum() == FEWEST_ELEMENTS
    told = [r for r in caplog.records if r.name.startswith("ptq4sam")]
    assert len(told) == 1
    assert "no kernel could be compiled" in told[0].getMessage()


@pytest.mark.parametrize(("setting", "usable"), [("0", False), (None, None)])
def test_the_switch(
    setting: str | None, usable: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if setting is None:
        monkeypatch.delenv(fused.SWITCH, raising=False)
        monkeypatch.setenv("CXX", "a-compiler-that-is-not-there")
        usable = torch.cuda.is_available()
    else:
        monkeypatch.setenv(fused.SWITCH, setting)
    assert fused._Compiler().usable() is usable


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
