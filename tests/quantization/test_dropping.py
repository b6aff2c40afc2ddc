"""The random choice of elements that stay float."""

from __future__ import annotations

import pytest
import torch

from ptq4sam.methods.adaptive_granularity import AdaptiveGranularityQuantizer
from ptq4sam.quantization.dropping import choose, keep_some_float
from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.quantizers import LSQPlusQuantizer, LSQQuantizer, Quantizer


def dropped(shape: tuple[int, ...], probability: float, seed: int) -> torch.Tensor:
    x = torch.randn(shape) * 1e3
    quantized = x.round()
    generator = torch.Generator().manual_seed(seed)
    mixed = keep_some_float(quantized, x, probability, generator)
    assert ((mixed == x) | (mixed == quantized)).all()
    return mixed == x


@pytest.mark.parametrize("shape", [(301, 333), (304, 333)])
@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_share_and_independence(probability: float, shape: tuple[int, int]) -> None:
    chosen = dropped(shape, probability, seed=3)
    assert chosen.float().mean() == pytest.approx(probability, abs=0.01)
    # Neither the place within a word nor a neighbour tells anything.
    flat = chosen.flatten().float()
    for offset in range(8):
        assert flat[offset::8].mean() == pytest.approx(probability, abs=0.02)
    # An eighth of all elements away is the next bit of the same byte.
    for apart in (1, len(flat) // 8):
        together = (flat[apart:] * flat[:-apart]).mean()
        assert together == pytest.approx(probability**2, abs=0.01)


def test_the_generator_decides() -> None:
    first, again, other = (dropped((1000,), 0.5, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("kind", [LSQQuantizer, LSQPlusQuantizer, AdaptiveGranularityQuantizer])
@pytest.mark.parametrize("probability", [0.25, 0.5])
def test_quantizing_some_is_quantizing_and_choosing(
    kind: type[Quantizer], probability: float
) -> None:
    quantizer = kind(Grid(3))
    x = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    x = (x if kind is not AdaptiveGranularityQuantizer else (4 * x).softmax(-1)).requires_grad_()
    quantizer.observe(x.detach() / 2, torch.randn(50, 3))
    choice = choose(x, probability, torch.Generator().manual_seed(1))
    weights = torch.randn(8, 50)

    def outcome(output: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return output, *torch.autograd.grad((output * weights).sum(), (x, quantizer.scale))

    together = outcome(quantizer.quantize_some(x, choice))
    apart = outcome(choice.mix(quantizer.quantize(x), x))
    assert torch.equal(together[0], apart[0])
    for ours, theirs in zip(together[1:], apart[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
