from __future__ import annotations

import pytest
import torch

from ptq4sam.errors import ConfigError
from ptq4sam.quantization.grid import MIN_SCALE, Grid, affine_codes, fake_quantize

GRIDS = [Grid(bits, symmetric) for bits in (2, 4, 8) for symmetric in (False, True)]


def parameters(grid: Grid, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return grid.affine_parameters(x.min() * 0.8, x.max() * 0.8)


@pytest.mark.parametrize(
    ("grid", "low", "high"), [(Grid(4), 0, 15), (Grid(4, True), -8, 7), (Grid(8, True), -128, 127)]
)
def test_limits(grid: Grid, low: int, high: int) -> None:
    assert (grid.qmin, grid.qmax, grid.levels) == (low, high, high - low + 1)


@pytest.mark.parametrize("bits", [-1, 0, 1, 17])
def test_impossible_bits(bits: int) -> None:
    with pytest.raises(ConfigError, match=f"{bits} bits"):
        Grid(bits)


def test_range_is_extended_to_zero() -> None:
    scale, zero_point = Grid(4).affine_parameters(torch.tensor(1.0), torch.tensor(3.0))
    assert float(scale) == pytest.approx(0.2)
    assert float(zero_point) == 0
    scale, zero_point = Grid(4).affine_parameters(torch.tensor(-3.0), torch.tensor(-1.0))
    assert float(scale) == pytest.approx(0.2)
    assert float(zero_point) == 15


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_numbers_of_a_range_are_those_of_tensors(bits: int) -> None:
    grid = Grid(bits)
    generator = torch.Generator().manual_seed(bits)
    ends = torch.randn(500, 2, generator=generator, dtype=torch.float64).sort(1).values
    # Zero points in the middle of two codes, and ranges of nothing, are among them.
    step = ends.new_tensor([[-0.5, grid.qmax - 0.5], [-1.5, grid.qmax - 1.5], [0, 0], [-1e-12, 0]])
    for low, high in torch.cat([ends, step]):
        expected = grid.affine_parameters(low, high)
        assert grid.affine_numbers(float(low), float(high)) == tuple(map(float, expected))


@pytest.mark.parametrize("grid", GRIDS)
def test_empty_range_has_a_scale(grid: Grid) -> None:
    scale, zero_point = grid.affine_parameters(torch.zeros(3), torch.zeros(3))
    assert torch.equal(scale, torch.full((3,), MIN_SCALE))
    assert bool(((zero_point >= grid.qmin) & (zero_point <= grid.qmax)).all())


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_output_is_on_the_grid_and_stays_there(grid: Grid, axis: int | None) -> None:
    x = torch.randn(5, 7, 3, generator=torch.Generator().manual_seed(1))
    if axis is None:
        scale, zero_point = parameters(grid, x)
        shape: tuple[int, ...] = ()
    else:
        rows = x.movedim(axis, 0).flatten(1)
        scale, zero_point = grid.affine_parameters(rows.amin(1) * 0.8, rows.amax(1) * 0.8)
        shape = tuple(-1 if axis == i else 1 for i in range(3))
    once = fake_quantize(x, scale, zero_point, grid, axis)
    codes = affine_codes(x, scale, zero_point, grid, axis)
    assert torch.equal(codes, codes.round())
    assert codes.min() >= grid.qmin
    assert codes.max() <= grid.qmax
    assert torch.equal(once, (codes - zero_point.reshape(shape)) * scale.reshape(shape))
    assert torch.equal(fake_quantize(once, scale, zero_point, grid, axis), once)


@pytest.mark.parametrize("grid", GRIDS)
def test_zero_stays_zero(grid: Grid) -> None:
    for low, high in ((-1.3, 0.4), (0.2, 0.9), (-2.0, -1.0)):
        ends = grid.affine_parameters(torch.tensor(low), torch.tensor(high))
        assert float(fake_quantize(torch.zeros(()), *ends, grid)) == 0


@pytest.mark.parametrize("grid", GRIDS)
def test_nearest_point_within_the_range(grid: Grid) -> None:
    x = torch.linspace(-2, 3, 999)
    scale, zero_point = grid.affine_parameters(x.min(), x.max())
    error = (fake_quantize(x, scale, zero_point, grid) - x).abs()
    # The zero point is rounded, which may cut half a step off one end.
    inner = (x >= (grid.qmin - zero_point) * scale) & (x <= (grid.qmax - zero_point) * scale)
    assert float(error[inner].max()) <= float(scale) / 2 * (1 + 1e-5)
    assert float(error.max()) <= float(scale) * (1 + 1e-5)


def test_halves_go_to_the_even_code() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, 3.5])
    y = fake_quantize(x, torch.tensor(1.0), torch.tensor(0.0), Grid(4))
    assert y.tolist() == [0.0, 2.0, 2.0, 4.0]


def test_gradients_are_those_of_the_smooth_function() -> None:
    """Straight through: what rounding adds counts as a constant."""
    generator = torch.Generator().manual_seed(3)
    grid = Grid(3)
    x = torch.randn(200, generator=generator, dtype=torch.float64)
    weight = torch.randn(200, generator=generator, dtype=torch.float64)
    scale = torch.tensor(0.31, dtype=torch.float64, requires_grad=True)
    zero_point = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    x.requires_grad_()
    (fake_quantize(x, scale, zero_point, grid) * weight).sum().backward()
    residue = ((x / scale).round() - x / scale).detach()

    def smooth(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
        codes = (x / scale + residue + zero_point).clamp(grid.qmin, grid.qmax)
        return ((codes - zero_point) * scale * weight).sum()

    expected = torch.autograd.grad(smooth(x, scale, zero_point), (x, scale, zero_point))
    for actual, wanted in zip((x.grad, scale.grad, zero_point.grad), expected, strict=True):
        assert actual is not None
        torch.testing.assert_close(actual, wanted)


def test_gradient_of_channel_scales_has_their_shape() -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    scale = torch.full((4,), 0.1).requires_grad_()
    fake_quantize(x, scale, torch.full((4,), 8.0), Grid(4), 0).sum().backward()
    for channel in range(4):
        alone = torch.tensor(0.1, requires_grad=True)
        fake_quantize(x[channel], alone, torch.tensor(8.0), Grid(4)).sum().backward()
        assert scale.grad is not None
        assert alone.grad is not None
        torch.testing.assert_close(scale.grad[channel], alone.grad)


def test_input_is_left_alone() -> None:
    x = torch.randn(10)
    before = x.clone()
    with torch.no_grad():
        fake_quantize(x, torch.tensor(0.1), torch.tensor(8.0), Grid(4))
    assert torch.equal(x, before)
