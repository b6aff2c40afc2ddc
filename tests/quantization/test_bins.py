"""Sums by bin: one after the other, and by products as on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptq4sam.quantization import bins
from ptq4sam.quantization.bins import add_to_bins_
from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.mse import Side, grid_search
from tests.devices import on_devices


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bins, "_adds_in_order", lambda _device: False)


def drawn(rows: int, columns: int, count: int) -> tuple[list[Tensor], Tensor]:
    """Two kinds of values, and their bins: most of them in the middle, some at the ends."""
    generator = torch.Generator().manual_seed(count)
    values = [torch.randn(rows, columns, generator=generator) for _ in range(2)]
    places = (torch.randn(rows, columns, generator=generator) * count / 8 + count / 2).long()
    return values, places.clamp_(0, count - 1)


def naive(values: list[Tensor], places: Tensor, count: int) -> Tensor:
    """One bin after the other."""
    each = [[x.double() * (places == place) for place in range(count)] for x in values]
    return torch.stack([torch.stack([x.sum(1) for x in kind], 1) for kind in each], 1)


@pytest.mark.parametrize("count", [1, 2, 5, 64, 65])
@pytest.mark.parametrize(("rows", "columns"), [(3, 1), (3, 20), (1, 9000)])
@pytest.mark.parametrize("here", [True, False], ids=["as-here", "as-on-a-gpu"])
def test_each_bin_has_the_sum_of_its_values(
    monkeypatch: pytest.MonkeyPatch, count: int, rows: int, columns: int, here: bool
) -> None:
    monkeypatch.setattr(bins, "_adds_in_order", lambda _device: here)
    values, places = drawn(rows, columns, count)
    sums = torch.ones(rows, 2, count, dtype=torch.float64)
    add_to_bins_(sums, values, places - count // 2)
    torch.testing.assert_close(sums, 1 + naive(values, places, count), rtol=1e-12, atol=1e-12)


def test_matrices_stay_small(as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces the sums are the same, bit for bit."""
    values, places = drawn(2, 9000, 65)
    found = []
    largest = []
    by_products = bins._by_products

    def watched(values: Tensor, places: Tensor, digits: int) -> Tensor:
        largest.append(values.numel())
        return by_products(values, places, digits)

    monkeypatch.setattr(bins, "_by_products", watched)
    for elements in (2**26, 2**17):
        monkeypatch.setattr(bins, "_ELEMENTS", elements)
        largest.clear()
        sums = torch.zeros(2, 2, 65, dtype=torch.float64)
        add_to_bins_(sums, values, places - 32)
        found.append((sums, max(largest)))
    (whole, all_at_once), (in_pieces, some) = found
    assert torch.equal(whole, in_pieces)
    assert some < all_at_once


@pytest.mark.parametrize("bits", [3, 6])
def test_a_search_for_ranges_ends_at_the_same(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    rows = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)).exp() - 0.5
    expected = grid_search(rows, Grid(bits), Side.BOTH)
    monkeypatch.setattr(bins, "_adds_in_order", lambda _device: False)
    assert all(map(torch.equal, grid_search(rows, Grid(bits), Side.BOTH), expected))


@on_devices
def test_two_calls_give_the_same_bits(device: torch.device) -> None:
    values, places = drawn(1, 2**18, 65)
    found = []
    for _ in range(3):
        sums = torch.zeros(1, 2, 65, dtype=torch.float64, device=device)
        add_to_bins_(sums, [x.to(device) for x in values], places.to(device) - 32)
        found.append(sums.cpu())
    assert all(torch.equal(sums, found[0]) for sums in found)
    torch.testing.assert_close(found[0], naive(values, places, 65), rtol=1e-10, atol=1e-10)
