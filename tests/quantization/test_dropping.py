"""The random choice of elements that stay float."""

from __future__ import annotations

import pytest
import torch

from ptq4sam.quantization.dropping import dropped

CPU = torch.device("cpu")


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_share_and_independence(probability: float) -> None:
    generator = torch.Generator().manual_seed(3)
    chosen = dropped(torch.Size([301, 333]), probability, generator, CPU)
    assert chosen.dtype == torch.bool
    assert chosen.float().mean() == pytest.approx(probability, abs=0.01)
    # Neither the place within a word nor a neighbour tells anything.
    flat = chosen.flatten().float()
    for offset in range(8):
        assert flat[offset::8].mean() == pytest.approx(probability, abs=0.02)
    together = (flat[1:] * flat[:-1]).mean()
    assert together == pytest.approx(probability**2, abs=0.01)


def test_the_generator_decides() -> None:
    first, again, other = (
        dropped(torch.Size([1000]), 0.5, torch.Generator().manual_seed(seed), CPU)
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
