"""The random choice of elements that stay float."""

from __future__ import annotations

import pytest
import torch

from ptq4sam.quantization.dropping import keep_some_float


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
