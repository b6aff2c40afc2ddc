"""The hybrid grid against the published formulas, written down again, and brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptq4sam.errors import CalibrationError, ConfigError
from ptq4sam.methods.hybrid import Hybrid, HybridQuantizer
from ptq4sam.methods.hybrid_grid import hybrid_numbers, hybrid_steps, log_codes
from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.modes import quantizer_mode
from ptq4sam.quantization.quantizers import Mode

Array = NDArray[np.float64]


def behind_gelu(seed: int = 0, rows: int = 200, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    """Outputs of a GELU with a few large ones, and the weight that multiplies them [in, out]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.gelu(spread * torch.randn(2, rows, 24, generator=generator) - 1)
    return x, torch.randn(24, 7, generator=generator)


def calibrated(bits: int = 4, batches: int = 1, settings: Hybrid | None = None) -> HybridQuantizer:
    quantizer = HybridQuantizer(Grid(bits), settings)
    with quantizer_mode(quantizer, Mode.OBSERVE):
        for seed in range(batches):
            quantizer(*behind_gelu(seed))
    return quantizer


def published(x: Array, low: float, knee: float, even: float, codes: int, levels: int) -> Array:
    """AHCPTQ's two branches, each on the numbers that belong to it."""
    y = x - low
    logarithm = np.round(-np.log2(np.maximum(y, 1e-20) / knee))
    powers = np.where(logarithm >= codes, 0.0, knee * 2.0 ** -np.maximum(logarithm, 0))
    steps = np.clip(np.round((y - knee) / even), 0, levels - codes - 1)
    return np.where(y <= knee, powers, knee + steps * even) + low


def in_use(quantizer: HybridQuantizer) -> tuple[float, float, float]:
    """Lowest value, knee and even step after snapping, in double."""
    numbers = quantizer.grid_in_use().numbers.as_numbers()
    return (
        -numbers.zero * numbers.step,
        numbers.knee * numbers.step,
        numbers.even_step * numbers.step,
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("grad", [False, True])
def test_points_are_the_published_ones(bits: int, grad: bool) -> None:
    quantizer = calibrated(bits)
    x, _ = behind_gelu(7, spread=5.0)
    with torch.set_grad_enabled(grad):
        found = quantizer(x).detach()
    expected = published(x.double().numpy(), *in_use(quantizer), *codes_of(quantizer))
    different = ~np.isclose(found.numpy(), expected, rtol=1e-5, atol=1e-7)
    # A number in the middle of two points may go either way.
    assert different.mean() < 1e-3
    assert len(found.unique()) <= 2**bits


def codes_of(quantizer: HybridQuantizer) -> tuple[int, int]:
    return int(quantizer.logarithmic), quantizer.grid.levels


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
@pytest.mark.parametrize(("rate", "share"), itertools.product((0.1, 0.3, 0.5), (0.125, 0.25, 0.5)))
def test_all_points_are_bytes_of_one_step(bits: int, rate: float, share: float) -> None:
    quantizer = calibrated(bits, settings=Hybrid((rate,), (share,)))
    grid = quantizer.grid_in_use()
    whole = grid.from_lowest()
    assert len(whole) == 2**bits
    assert bool((whole.diff() > 0).all())
    assert int(whole[0]) == 0
    assert int(whole[-1]) <= 255
    assert 0 <= grid.zero <= 255
    # Halves below the knee, one distance above it.
    codes = int(quantizer.logarithmic)
    assert (whole[1:codes] * 2).tolist() == whole[2 : codes + 1].tolist()
    assert len(whole[codes:].diff().unique()) <= 1
    # Snapping leaves both ends, and the lowest value to half a step.
    x, _ = behind_gelu()
    assert grid.ends()[1] == pytest.approx(float(x.max()), abs=float(grid.step))
    assert grid.ends()[0] == pytest.approx(float(x.min()), abs=0.51 * float(grid.step))
    assert sorted(quantizer(grid.points().float()).unique().tolist()) == pytest.approx(
        grid.points().tolist(), abs=1e-6
    )


@pytest.mark.parametrize("bits", [4, 6])
def test_learned_scales_that_leave_zero_out_of_reach_still_give_bytes(bits: int) -> None:
    quantizer = calibrated(bits)
    with torch.no_grad():
        quantizer.minimum.fill_(-50.0)
    grid = quantizer.grid_in_use()
    assert grid.zero == 255
    assert quantizer.step_bounds == (-255, 0)
    x, _ = behind_gelu()
    assert bool(grid.holds_steps(quantizer.steps(x)).all())


def test_the_pair_of_whole_numbers_is_the_nearest() -> None:
    bits, codes = 4, 4
    even = 2**bits - codes - 1
    for knee, step in ((0.4, 0.11), (0.1, 0.5), (0.9, 0.03)):
        found = hybrid_numbers(
            torch.tensor(knee), torch.tensor(step), torch.tensor(0.0), bits, codes
        )
        ratio = float(found.even_step / found.knee)
        others = [
            n / (8 * k) for k in range(1, 32) for n in range(1, 255) if 8 * k + n * even <= 255
        ]
        assert abs(ratio - step / knee) == pytest.approx(
            min(abs(r - step / knee) for r in others), abs=1e-7
        )


def test_large_values_do_not_fall_onto_the_knee() -> None:
    """Published code zeroes what exceeds the number of logarithmic codes, here 2."""
    quantizer = calibrated(settings=Hybrid((0.3,), (0.125,)))
    assert int(quantizer.logarithmic) == 2
    x = torch.tensor([2.5, 3.0, 4.0])
    even_step = in_use(quantizer)[2]
    assert bool(((quantizer(x) - x).abs() <= 0.51 * even_step).all())


def test_the_search_finds_the_pair_of_least_error() -> None:
    settings = Hybrid()
    pairs = list(itertools.product(settings.knee_rates, settings.log_shares))
    total = np.zeros(len(pairs))
    for seed in range(3):
        x, weight = (tensor.double().numpy() for tensor in behind_gelu(seed))
        for index, (rate, share) in enumerate(pairs):
            alone = HybridQuantizer(Grid(4), Hybrid((rate,), (share,)))
            with quantizer_mode(alone, Mode.OBSERVE):
                alone(*behind_gelu(seed))
            moved = published(x, *in_use(alone), *codes_of(alone))
            total[index] += np.mean(((moved - x) @ weight) ** 2)
    quantizer = calibrated(batches=3)
    assert quantizer._errors == pytest.approx(total.tolist(), rel=1e-3)
    rate, share = pairs[int(total.argmin())]
    extents = [float(x.max() - x.min()) for x, _ in (behind_gelu(seed) for seed in range(3))]
    assert float(quantizer.scale) == pytest.approx(rate * sum(extents) / 3, rel=1e-5)
    assert int(quantizer.logarithmic) == log_codes(4, share, rate)
    # One that is taken blindly is worse.
    assert total.min() < 0.9 * total.max()


def test_the_pair_that_it_has_is_its_first_choice() -> None:
    quantizer, (x, _) = calibrated(), behind_gelu()
    nothing = torch.zeros(())
    for own in (4, 7):
        quantizer.use_pair(own)
        expected = quantizer(x)
        options = quantizer.choices(nothing, nothing, ())
        found = []
        for place in range(options.count):
            options.use(place)
            found.append(in_use(quantizer))
        assert options.count == 9
        assert len(set(found)) > 5
        options.settle(torch.tensor(0))
        assert torch.equal(quantizer(x), expected)


def test_the_weight_decides() -> None:
    """Errors are those of the product, not of the input."""
    x, weight = behind_gelu()
    # Only the sign of large numbers' errors matters where one channel has all the weight.
    loud = torch.zeros_like(weight)
    loud[x.amax((0, 1)).argmax()] = 10.0
    errors = []
    for value in (weight, loud, None):
        quantizer = HybridQuantizer(Grid(4))
        with quantizer_mode(quantizer, Mode.OBSERVE):
            quantizer(x, value)
        errors.append(quantizer._errors)
    assert errors[0] != errors[1] != errors[2]


def test_gradients_are_those_of_the_smooth_function() -> None:
    """Straight through: what rounding and snapping add counts as a constant."""
    quantizer = calibrated()
    x, weight = behind_gelu(3, spread=4.0)
    x.requires_grad_()
    (quantizer(x) @ weight).square().sum().backward()

    low, knee_value, even_value = in_use(quantizer)
    knee = torch.tensor(knee_value, dtype=torch.float64, requires_grad=True)
    even = torch.tensor(even_value, dtype=torch.float64, requires_grad=True)
    free = x.detach().double().requires_grad_()
    codes, levels = codes_of(quantizer)
    y = free - low
    raw = -torch.log2(y.clamp(min=1e-20) / knee)
    logarithm = raw + (raw.round() - raw).detach()
    powers = torch.where(logarithm >= codes, 0.0 * y, knee * torch.exp2(-logarithm))
    ratio = (y - knee) / even
    steps = (ratio + (ratio.round() - ratio).detach()).clamp(0, levels - codes - 1)
    smooth = torch.where(y <= knee, powers, knee + steps * even) + low
    (smooth @ weight.double()).square().sum().backward()
    assert x.grad is not None
    assert knee.grad is not None
    assert even.grad is not None
    close = torch.isclose(x.grad.double(), free.grad, rtol=1e-3, atol=1e-3)
    assert float(close.double().mean()) > 0.999
    assert quantizer.scale.grad is not None
    assert quantizer.even_scale.grad is not None
    assert float(quantizer.scale.grad) == pytest.approx(float(knee.grad), rel=1e-3)
    assert float(quantizer.even_scale.grad) == pytest.approx(float(even.grad), rel=1e-3)
    assert abs(float(even.grad)) > 1e-3


def test_codes_steps_and_values_say_the_same() -> None:
    quantizer = calibrated()
    x, _ = behind_gelu(5)
    grid, steps = quantizer.grid_in_use(), quantizer.steps(x)
    assert torch.equal(steps, steps.round())
    assert torch.equal(steps * quantizer.step, quantizer(x).detach())
    assert torch.equal(grid.whole_points()[quantizer.codes(x).long()].float(), steps)
    low, high = quantizer.step_bounds
    assert low <= int(steps.min())
    assert int(steps.max()) <= high
    assert high - low <= quantizer.grid.largest_step
    assert bool(grid.holds_steps(steps.double()).all())
    assert bool(grid.holds(quantizer(x).detach().double()).all())
    assert not bool(grid.holds(quantizer(x).detach().double() + 0.4 * float(grid.step)).any())


def test_what_is_no_number_is_found() -> None:
    x = torch.full((5,), 0.25)
    x[1] = torch.nan
    assert calibrated().steps(x).isnan().nonzero().flatten().tolist() == [1]


def test_learning_moves_both_scales_and_leaves_a_grid() -> None:
    quantizer = calibrated()
    before = [float(parameter) for parameter in quantizer.learned()]
    optimizer = torch.optim.Adam(quantizer.learned(), lr=0.01, fused=True)
    x, weight = behind_gelu(2, spread=4.0)
    for _ in range(5):
        optimizer.zero_grad()
        ((quantizer(x) - x) @ weight).square().mean().backward()
        optimizer.step()
        quantizer.constrain_()
    with torch.no_grad():
        moved = quantizer(x)
    assert [float(parameter) for parameter in quantizer.learned()] != before
    expected = published(x.double().numpy(), *in_use(quantizer), *codes_of(quantizer))
    assert float((np.abs(moved.numpy() - expected) > 1e-5).mean()) < 1e-3


def test_what_cannot_be_hybrid() -> None:
    quantizer = HybridQuantizer(Grid(4))
    quantizer.name = "mlp.lin2"
    with (
        quantizer_mode(quantizer, Mode.OBSERVE),
        pytest.raises(CalibrationError, match=r"mlp\.lin2: all values are 0"),
    ):
        quantizer(torch.zeros(3, 4))
    with pytest.raises(ConfigError, match=r"knee_rates: .* allowed: some between 0 and 1"):
        Hybrid(knee_rates=(1.5,))


def test_a_state_gives_the_same_points() -> None:
    quantizer, other = calibrated(), HybridQuantizer(Grid(4))
    other.load_state_dict(quantizer.state_dict())
    x, _ = behind_gelu(9)
    assert torch.equal(other(x), quantizer(x))
    assert math.isclose(float(other.step), float(quantizer.step), rel_tol=0)


def test_the_graph_function_is_the_kernel() -> None:
    """With Python's numbers, as graphs have them, and only the ends that count."""
    quantizer = calibrated()
    x, _ = behind_gelu(4)
    grid = quantizer.grid_in_use()
    found = hybrid_steps(x, grid.numbers.as_numbers(), grid.even, grid.logarithmic)
    assert torch.equal(found - grid.zero, quantizer.steps(x))
