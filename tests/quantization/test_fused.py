"""Compiled kernels: the same values as operations one by one, and a way back without a compiler."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ptq4sam.methods.adaptive_granularity import AdaptiveGranularityQuantizer
from ptq4sam.quantization import fused, grid, whole
from ptq4sam.quantization.dropping import choose, keep_some_float
from ptq4sam.quantization.fused import FEWEST_ELEMENTS, fused_exactly
from ptq4sam.quantization.grid import Grid, fake_quantize, fake_quantize_some
from ptq4sam.quantization.rounding import AdaRoundQuantizer
from tests.devices import on_devices
from tests.quantization.compilers import messages, needs_compiler, usable_compiler

SIDE = 1024

Result = tuple[Tensor, ...]


pytestmark = pytest.mark.usefixtures("kernels")


def random_bits(x: Tensor) -> torch.Generator:
    return torch.Generator(x.device).manual_seed(3)


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
