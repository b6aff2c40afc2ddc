"""Bicubic resizing as torch has it, by products and sums that every runtime rounds alike."""

from __future__ import annotations

import pytest
import torch

from ptq4sam.operators.resizing import BicubicResize, PortableBicubicResize, cubic_taps


@torch.no_grad()
@pytest.mark.parametrize("given", [(4, 4), (8, 8), (16, 8), (3, 5)])
def test_it_is_torchs(given: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *given, generator=torch.Generator().manual_seed(0))
    source = BicubicResize((16, 16))
    portable = PortableBicubicResize.of(source)
    torch.testing.assert_close(portable(x), source(x), atol=3e-6, rtol=0)
    assert portable(x).shape == (2, 3, 16, 16)


@torch.no_grad()
def test_the_same_size_is_no_resize() -> None:
    x = torch.randn(1, 2, 6, 6)
    assert BicubicResize((6, 6))(x).equal(x)
    assert PortableBicubicResize((6, 6))(x).equal(x)


@pytest.mark.parametrize("given", [16, 32])
def test_weights_are_exact_and_add_up_to_one(given: int) -> None:
    """At powers of two they are multiples of 2^-11, which no runtime rounds."""
    places, weights = cubic_taps(given, 64)
    assert weights.sum(0).equal(torch.ones(64))
    assert (weights * 2**11).equal((weights * 2**11).round())
    assert places.min() == 0
    assert places.max() == given - 1
