from __future__ import annotations

from typing import Literal

import pytest
import torch

from ptq4sam.quantization import mse
from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.mse import Side, fast_search, grid_search, range_loss, side_of

Kind = Literal["normal", "gelu", "heavy", "outlier", "skewed", "grid"]


def sample(kind: Kind, rows: int = 3, count: int = 300) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(kind))
    x = torch.randn(rows, count, generator=generator)
    if kind == "gelu":
        return torch.nn.functional.gelu(2 * x)
    if kind == "heavy":
        return x * x.abs().exp()
    if kind == "outlier":
        x[:, 0] = 60
    if kind == "skewed":
        return x.exp() - 0.2
    if kind == "grid":
        return (4 * x).round() / 4
    return x


def naive_search(row: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Every width and zero point, one after the other, as the description says."""
    extent = row.max().clamp(min=0) - row.min().clamp(max=0)
    best = (float("inf"), row.min(), row.max())
    for step in range(1, 101):
        width = extent / 100 * step
        for zero_point in range(grid.levels):
            shift = zero_point * (width / grid.qmax)
            low, high = -shift, width - shift
            scale, zero = grid.affine_parameters(low, high)
            codes = (torch.round(row / scale) + zero).clamp(grid.qmin, grid.qmax)
            loss = float((((codes - zero) * scale - row).abs() ** 2.4).double().mean())
            if loss < best[0]:
                best = (loss, low, high)
    return best[1], best[2]


@pytest.mark.parametrize("kind", ["normal", "gelu", "heavy", "outlier", "skewed", "grid"])
@pytest.mark.parametrize("bits", [2, 4])
def test_grid_search_is_the_naive_one(kind: Kind, bits: int) -> None:
    rows, grid = sample(kind, rows=2), Grid(bits)
    low, high = grid_search(rows, grid, Side.BOTH)
    expected = [naive_search(row, grid) for row in rows]
    assert low.tolist() == [float(ends[0]) for ends in expected]
    assert high.tolist() == [float(ends[1]) for ends in expected]


@pytest.mark.parametrize("kind", ["normal", "gelu", "heavy", "outlier", "skewed", "grid"])
@pytest.mark.parametrize("bits", [3, 8])
def test_bounds_are_below_the_losses(kind: Kind, bits: int) -> None:
    rows, grid = sample(kind), Grid(bits)
    extent = rows.amax(1).clamp(min=0) - rows.amin(1).clamp(max=0)
    kernel = mse._bound_kernel(grid.levels, rows.device)
    for share in (0.01, 0.1, 0.3, 0.7, 1.0):
        step = extent * share / grid.qmax
        bounds = mse._lower_bounds(rows, step, kernel)[1].double()
        for zero_point in range(0, grid.levels, max(1, grid.levels // 32)):
            low = -zero_point * step
            loss = range_loss(rows, low, low + extent * share, grid)
            bound = bounds[:, zero_point]
            assert bool((bound <= loss * (1 + mse._SLACK) + 1e-12).all())
            # A bound of half the loss would leave thousands of ranges to try.
            tight = share >= 0.7 and kind != "grid"
            assert not tight or bool((bound >= loss * 0.9).all())


def test_narrow_ranges_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    bounded = []
    original = mse._lower_bounds

    def counted(*arguments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        bounded.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(mse, "_lower_bounds", counted)
    rows = sample("normal", count=2000)
    _, high = grid_search(rows, Grid(6), Side.BOTH)
    assert len(bounded) < mse.WIDTHS / 2
    assert bool((high > rows.amax(1) / 2).all())


@pytest.mark.parametrize("grid", [Grid(4), Grid(4, True)])
@pytest.mark.parametrize("side", [Side.POSITIVE, Side.NEGATIVE])
def test_one_sided_search(grid: Grid, side: Side) -> None:
    sign = 1 if side is Side.POSITIVE else -1
    rows = sign * sample("heavy").abs()
    assert side_of(rows) is side
    low, high = grid_search(rows, grid, side)
    largest = rows.abs().amax(1)
    for index in range(3):
        losses = {}
        for step in range(1, 101):
            ends = sorted((0.0, sign * float(largest[index] / 100 * step)))
            loss = range_loss(rows[index][None], *torch.tensor(ends)[:, None], grid)
            losses[tuple(ends)] = float(loss)
        assert (float(low[index]), float(high[index])) == min(losses, key=losses.__getitem__)


@pytest.mark.parametrize("search", [grid_search, fast_search])
@pytest.mark.parametrize("kind", ["normal", "heavy", "outlier"])
@pytest.mark.parametrize("grid", [Grid(4), Grid(4, True)])
def test_not_worse_than_the_full_range(search: object, kind: Kind, grid: Grid) -> None:
    rows = sample(kind, rows=1)
    full = range_loss(rows, rows.amin(1), rows.amax(1), grid)
    assert callable(search)
    found = range_loss(rows, *search(rows, grid, Side.BOTH), grid)
    assert float(found) < float(full) * 1.0001


def test_pieces_do_not_change_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = sample("normal", count=10_000)
    ends = rows.amin(1), rows.amax(1)
    whole = range_loss(rows, *ends, Grid(4))
    monkeypatch.setattr(mse, "pieces", lambda rows: torch.split(rows, 77, dim=1))
    torch.testing.assert_close(range_loss(rows, *ends, Grid(4)), whole, rtol=1e-7, atol=0)


def test_side_counts_zero_as_either() -> None:
    assert side_of(torch.tensor([0.0, 1.0])) is Side.POSITIVE
    assert side_of(torch.tensor([0.0, -1.0])) is Side.NEGATIVE
    assert side_of(torch.tensor([-1.0, 1.0])) is Side.BOTH
