"""Points even in log(1 + a x) against the published formulas."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptq4sam.errors import CalibrationError, ConfigError
from ptq4sam.methods.lnq import Lnq, LnqQuantizer, points_and_ends
from ptq4sam.operators.attention_products import values_worth
from ptq4sam.quantization.affine import FixedQuantizer
from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.modes import quantizer_mode
from ptq4sam.quantization.quantizers import Mode
from ptq4sam.quantization.whole import EXACT

CURVATURES = Lnq().curvatures


def attention(seed: int = 0, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(2, 3, 8, 16, generator=generator)
    return logits.softmax(-1), torch.randn(2, 3, 16, 5, generator=generator)


def calibrated(bits: int = 4, batches: int = 1, settings: Lnq | None = None) -> LnqQuantizer:
    quantizer = LnqQuantizer(Grid(bits), settings)
    with quantizer_mode(quantizer, Mode.OBSERVE):
        for seed in range(batches):
            quantizer(*attention(seed))
    return quantizer


def published(x: Tensor, bits: int, curvature: float, largest: float) -> NDArray[np.float64]:
    """AHCQ-SAM's way there and back, with as many points as there are codes."""
    last = 2**bits - 1
    cut = np.clip(x.double().numpy(), 1e-20, largest)
    codes = np.round(np.log(1 + curvature * cut) / np.log(1 + curvature * largest) * last)
    return ((1 + curvature * largest) ** (codes / last) - 1) / curvature


@pytest.mark.parametrize("bits", [2, 4, 6])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_points_are_the_published_ones_to_half_a_byte(bits: int, curvature: float) -> None:
    quantizer = calibrated(bits, settings=Lnq((curvature,)))
    largest = 255 * float(quantizer.step)
    x, _ = attention(5)
    difference = quantizer(x).numpy() - published(x, bits, curvature, largest)
    # Points of large curvature lie less than a byte apart near zero.
    crowded = np.argmax(np.diff(quantizer.points.numpy()) != 1) + 1
    near = np.abs(difference) <= 0.51 * float(quantizer.step)
    assert near[quantizer.codes(x).numpy() >= crowded].mean() > 0.999
    whole = quantizer.points
    assert len(whole) == 2**bits
    assert (float(whole[0]), float(whole[-1])) == (0, 255)
    assert bool((whole.diff() > 0).all())


def test_small_curvature_is_even_and_large_is_logarithmic() -> None:
    even = points_and_ends(4, 0.001, 1.0)[0]
    assert even == [round(255 * code / 15) for code in range(16)]
    steep = points_and_ends(3, 1e6, 1.0)[0]
    ratios = [b / a for a, b in itertools.pairwise(steep[5:])]
    assert min(ratios) > 5


def test_the_search_finds_curvature_and_largest_point() -> None:
    errors = np.zeros(len(CURVATURES))
    for index, curvature in enumerate(CURVATURES):
        for seed in range(3):
            x, value = attention(seed)
            scan = []
            for largest in np.linspace(0.15, 1.0, 60) * float(x.max()):
                moved = torch.from_numpy(published(x, 4, curvature, largest))
                product = (moved @ value.double() - x.double() @ value.double()).abs()
                scan.append(float((product**2.4).mean()))
            errors[index] += min(scan)
    quantizer = calibrated(batches=3)
    # Snapped to bytes, and looked at in fewer places.
    np.testing.assert_allclose(quantizer._errors, errors, rtol=0.15)
    assert int(np.argmin(quantizer._errors)) == int(errors.argmin())
    assert errors.min() < 0.7 * errors.max()


@pytest.mark.parametrize("curvature", [0.001, 5.0, 200.0, 1e6])
def test_no_row_exceeds_the_bound_of_its_sums(curvature: float) -> None:
    quantizer = calibrated(settings=Lnq((curvature,)))
    bound = quantizer.largest_row
    # The worst row: as many outputs as add up to 1 at the beginning of a code.
    worst = 0.0
    for end in quantizer.ends.tolist():
        row = torch.full((int(1 / end),), end * (1 + 1e-6))
        worst = max(worst, float(quantizer(row).double().sum()))
    assert 0.9 * bound < worst <= bound * (1 + 1e-5)


def test_a_product_whose_sums_float32_would_round_is_made_in_float64() -> None:
    quantizer = calibrated(settings=Lnq((1e6,)))
    value = FixedQuantizer(Grid(8))
    value.merge((torch.tensor(-1.0), torch.tensor(1.0)))
    assert values_worth(quantizer, value).largest > EXACT


def test_codes_steps_and_values_say_the_same() -> None:
    quantizer = calibrated()
    x, _ = attention(4)
    steps, grid = quantizer.steps(x), quantizer.grid_in_use()
    assert torch.equal(steps * quantizer.step, quantizer(x))
    assert torch.equal(grid.whole_points()[quantizer.codes(x).long()].float(), steps)
    assert bool(grid.holds_steps(steps.double()).all())
    assert not bool(grid.holds_steps(steps.double() + 0.5).any())
    x[0, 0, 0, 0] = torch.nan
    assert int(quantizer.steps(x).isnan().sum()) == 1


def test_gradients_go_through_up_to_the_largest_point() -> None:
    quantizer = calibrated()
    top = 255 * float(quantizer.step)
    x = torch.tensor([0.1 * top, 0.9 * top, 1.5 * top], requires_grad=True)
    y = quantizer(x)
    with torch.no_grad():
        torch.testing.assert_close(y, quantizer(x))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1, 0]


def test_a_state_gives_the_same_points() -> None:
    quantizer, other = calibrated(), LnqQuantizer(Grid(4))
    other.load_state_dict(quantizer.state_dict())
    x, _ = attention(9)
    assert torch.equal(other(x), quantizer(x))
    assert list(quantizer.problems()) == []
    quantizer.points[3] = 0.5
    assert list(quantizer.problems()) == [
        "has points that are not ascending whole numbers from 0 to 255"
    ]
    for ends in (other.ends.flip(0), -other.ends, torch.full_like(other.ends, torch.nan)):
        quantizer.load_state_dict({**other.state_dict(), "ends": ends})
        assert list(quantizer.problems()) == [
            "has ends of codes that are not ascending numbers above 0"
        ]
    # As published: one point more than there are codes.
    more = {
        "points": torch.cat([other.points, other.points[-1:] + 1]),
        "ends": torch.cat([other.ends, other.ends[-1:] + 1]),
    }
    quantizer.load_state_dict({**other.state_dict(), **more})
    assert list(quantizer.problems()) == ["has 17 points and 16 ends for 16 codes"]


def test_what_has_no_such_points() -> None:
    quantizer = LnqQuantizer(Grid(4))
    x, value = attention()
    with quantizer_mode(quantizer, Mode.OBSERVE):
        with pytest.raises(CalibrationError, match="without values"):
            quantizer(x)
        with pytest.raises(CalibrationError, match="found numbers from -"):
            quantizer(x - 0.5, value)
    with pytest.raises(ConfigError, match="8 given, a grid lnq has up to 6"):
        LnqQuantizer(Grid(8))
    with pytest.raises(ConfigError, match="curvatures"):
        Lnq(())
