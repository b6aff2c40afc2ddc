from __future__ import annotations

import numpy as np
import pytest
import torch

from ptq4sam.errors import CalibrationError, ConfigError
from ptq4sam.quantization.grid import Grid, fake_quantize
from ptq4sam.quantization.observers import OBSERVERS, MSEObserver, PCTObserver

PER_CHANNEL = [
    name for name, kind in OBSERVERS.items() if not (kind.per_tensor_only or kind.averages)
]


@pytest.fixture
def batches() -> torch.Tensor:
    return torch.randn(3, 4, 50, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", OBSERVERS)
def test_nothing_observed(name: str) -> None:
    with pytest.raises(CalibrationError, match="nothing was observed"):
        OBSERVERS[name](Grid(4)).quantization_parameters()


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(name: str, bad: float) -> None:
    x = torch.randn(3, 5)
    x[1, 2] = bad
    with pytest.raises(CalibrationError, match="1 of 15 observed values"):
        OBSERVERS[name](Grid(4)).observe(x)


def test_empty_batch() -> None:
    with pytest.raises(CalibrationError, match=r"empty tensor \[0, 3\]"):
        OBSERVERS["MinMaxObserver"](Grid(4)).observe(torch.empty(0, 3))


@pytest.mark.parametrize("name", [n for n in OBSERVERS if n not in PER_CHANNEL])
def test_channels_where_there_are_none(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        OBSERVERS[name](Grid(4), 0)


@pytest.mark.parametrize("name", PER_CHANNEL)
def test_a_channel_is_what_it_is_alone(name: str, batches: torch.Tensor) -> None:
    together, shifted = OBSERVERS[name](Grid(4), 0), OBSERVERS[name](Grid(4), 1)
    together.observe(batches[0])
    shifted.observe(batches[0].T)
    assert torch.equal(together.minimum, shifted.minimum)
    for channel in range(4):
        alone = OBSERVERS[name](Grid(4), 0)
        alone.observe(batches[0, channel : channel + 1])
        torch.testing.assert_close(together.minimum[channel], alone.minimum[0])
        torch.testing.assert_close(together.maximum[channel], alone.maximum[0])


def test_batches_are_merged(batches: torch.Tensor) -> None:
    running, mean = OBSERVERS["MinMaxObserver"](Grid(4)), OBSERVERS["AvgMinMaxObserver"](Grid(4))
    for batch in batches:
        running.observe(batch)
        mean.observe(batch)
    assert float(running.minimum) == float(batches.min())
    assert float(running.maximum) == float(batches.max())
    assert float(mean.minimum) == pytest.approx(float(batches.flatten(1).amin(1).mean()))
    assert float(mean.maximum) == pytest.approx(float(batches.flatten(1).amax(1).mean()))


SEARCHING = ["MSEObserver", "AvgMSEObserver", "MSEFastObserver", "AvgMSEFastObserver"]


@pytest.mark.parametrize("grid", [Grid(4), Grid(4, True)], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("name", SEARCHING)
@pytest.mark.parametrize(
    "ends",
    [
        [(-1, 2), (1, 2)],
        [(-1, 2), (10, 11)],
        [(-2, 1), (-2, -1)],
        [(0, 2), (-3, 1)],
        [(1, 2), (-2, -1)],
        [(-2, 0), (-1, 2), (0, 3)],
        [(-1, 2), (1.5, 1.5), (0, 0)],
    ],
    ids=str,
)
def test_a_later_batch_on_another_side(
    name: str, grid: Grid, ends: list[tuple[float, float]]
) -> None:
    """Whatever side of zero the first batch was on, the range of each is that of its values."""
    observer, ranges = OBSERVERS[name](grid), []
    for low, high in ends:
        batch = torch.linspace(low, high, 300)
        ranges.append(observer.range_of(batch))
        observer.merge(*ranges[-1])
        scale, zero_point = grid.affine_parameters(*ranges[-1])
        error = fake_quantize(batch, scale, zero_point, grid) - batch
        # The best range may cut ends off, a little.
        assert float(error.abs().max()) <= scale / 2 + 0.1 * float(batch.abs().max())
    minima, maxima = (torch.stack(each) for each in zip(*ranges, strict=True))
    merged = (minima.mean(), maxima.mean()) if "Avg" in name else (minima.min(), maxima.max())
    torch.testing.assert_close((observer.minimum, observer.maximum), merged)


@pytest.mark.parametrize("name", SEARCHING)
def test_the_range_of_a_batch_is_its_own(name: str) -> None:
    """Not of what came before: processes that share batches end alike."""
    batches = [torch.linspace(low, high, 300) for low, high in ((-1, 1), (0.1, 2), (-3, -1))]
    used = OBSERVERS[name](Grid(4))
    for batch in (*batches, *batches):
        used.observe(batch)
        assert used.range_of(batch) == OBSERVERS[name](Grid(4)).range_of(batch)


@pytest.mark.parametrize("name", OBSERVERS)
def test_a_later_batch_on_one_side(name: str) -> None:
    observer = OBSERVERS[name](Grid(4))
    observer.observe(torch.linspace(-1, 2, 50))
    observer.observe(torch.linspace(1, 2, 50))
    observer.observe(torch.full((50,), 1.5))
    scale, _ = observer.quantization_parameters()
    assert bool(torch.isfinite(scale))
    assert 0 < float(scale) < 1


@pytest.mark.parametrize("name", OBSERVERS)
def test_constant_tensors(name: str) -> None:
    for value in (0.0, 1.0, -1.0):
        observer = OBSERVERS[name](Grid(4))
        observer.observe(torch.full((3, 3), value))
        scale, zero_point = observer.quantization_parameters()
        restored = (torch.round(torch.tensor(value) / scale) + zero_point).clamp(0, 15) - zero_point
        assert float(restored * scale) == pytest.approx(value, abs=1e-3)


@pytest.mark.parametrize("name", PER_CHANNEL)
def test_constant_channels(name: str) -> None:
    x = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    x[1], x[2] = 0, 0.7
    observer = OBSERVERS[name](Grid(4), 0)
    observer.observe(x)
    scale, _ = observer.quantization_parameters()
    assert bool((scale > 0).all())
    # Bounded minimisation of a jagged function may end a little beside the value.
    assert float(scale[2]) * 15 == pytest.approx(0.7, rel=0.1 if "Fast" in name else 1e-2)


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_percentiles_are_those_of_numpy(axis: int | None) -> None:
    """Of weights by channel and activations by tensor alike; the moving ones go on from them."""
    generator = np.random.RandomState(3)
    batches = [generator.standard_t(2, (3, 4, 7_001)).astype(np.float32) for _ in range(3)]
    plain, moving = (
        OBSERVERS[name](Grid(8), axis) for name in ("PCTObserver", "MovingPCTObserver")
    )
    ends = []
    for batch in batches:
        plain.reset()
        plain.observe(torch.from_numpy(batch))
        moving.observe(torch.from_numpy(batch))
        rows = (
            batch.reshape(1, -1)
            if axis is None
            else np.moveaxis(batch, axis, 0).reshape(batch.shape[axis], -1)
        )
        expected = np.quantile(rows.astype(np.float64), [1 - 0.99999, 0.99999], axis=1)
        ends.append(expected[:, 0] if axis is None else expected)
        found = np.stack([plain.minimum.numpy(), plain.maximum.numpy()])
        np.testing.assert_allclose(found, ends[-1], rtol=1e-5)
    first, second, third = ends
    moved = first + 0.01 * (second - first)
    moved = moved + 0.01 * (third - moved)
    found = np.stack([moving.minimum.numpy(), moving.maximum.numpy()])
    np.testing.assert_allclose(found, moved, rtol=1e-5)


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_squared_errors_are_least_on_weights_and_activations(axis: int | None) -> None:
    """Of OMSE's range against a hundred others, by the error of its own metric."""
    x = torch.from_numpy(np.random.RandomState(4).standard_t(3, (3, 40)).astype(np.float32))
    observer = OBSERVERS["MSEObserver"](Grid(4, symmetric=True), axis)
    observer.observe(x)

    def errors(scale: torch.Tensor) -> torch.Tensor:
        quantized = fake_quantize(x, scale, torch.zeros_like(scale), observer.grid, axis)
        lost = (quantized - x).abs() ** 2.4
        if axis is None:
            return lost.mean()
        return lost.movedim(axis, 0).flatten(1).mean(1)

    largest = x.abs().max() if axis is None else x.movedim(axis, 0).flatten(1).abs().amax(1)
    least = torch.stack([errors(largest * k / 100 / 7.5) for k in range(10, 101)]).amin(0)
    found = errors(observer.quantization_parameters()[0])
    assert bool((found <= least * 1.02).all())
    assert bool((found < errors(largest / 7.5)).any())


def test_percentile_cuts_a_lone_outlier() -> None:
    x = torch.linspace(-1, 1, 400_001)
    x[7] = 1000.0
    observer = PCTObserver(Grid(8))
    observer.observe(x)
    assert float(observer.maximum) == pytest.approx(1, rel=1e-4)
    small = PCTObserver(Grid(8))
    small.observe(torch.tensor([2.0]))
    assert float(small.maximum) == 2


def test_grid_search_refuses_hours() -> None:
    with pytest.raises(ConfigError, match="12 bits"):
        MSEObserver(Grid(12))
    MSEObserver(Grid(12, symmetric=True)).observe(torch.randn(100))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types(dtype: torch.dtype) -> None:
    observer = OBSERVERS["MSEObserver"](Grid(4))
    observer.observe(torch.randn(100).to(dtype))
    assert observer.minimum.dtype == torch.float32
