from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptq4sam.errors import CalibrationError
from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.quantizers import Mode
from ptq4sam.quantization.rounding import AdaRoundQuantizer


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(5, 40, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def quantizer(weight: Tensor) -> AdaRoundQuantizer:
    quantizer = AdaRoundQuantizer(Grid(4), "MinMaxObserver", 0)
    quantizer.mode = Mode.OBSERVE
    quantizer(weight)
    quantizer.mode = Mode.QUANTIZE
    return quantizer


def on_grid(quantizer: AdaRoundQuantizer, values: Tensor) -> bool:
    codes = values / quantizer.scale[:, None] + quantizer.zero_point[:, None]
    return bool(((codes - codes.round()).abs() < 1e-4).all())


def test_learning_starts_where_the_weight_is(quantizer: AdaRoundQuantizer, weight: Tensor) -> None:
    assert quantizer.rounding == "nearest"
    quantizer.begin_learning(weight)
    assert quantizer.rounding == "soft"
    # MinMax ranges leave out at most half a step, by rounding the zero point.
    inside = (quantizer.codes(weight) > 0) & (quantizer.codes(weight) < 15)
    torch.testing.assert_close(quantizer(weight)[inside], weight[inside], atol=1e-5, rtol=1e-4)
    assert not on_grid(quantizer, quantizer(weight))


def test_hard_rounding_is_on_the_grid_next_to_the_weight(
    quantizer: AdaRoundQuantizer, weight: Tensor
) -> None:
    quantizer.begin_learning(weight)
    with torch.no_grad():
        quantizer.alpha.add_(3 * torch.randn(weight.shape))
    up = quantizer.alpha >= 0
    quantizer.finish_learning()
    result = quantizer(weight)
    assert on_grid(quantizer, result)
    inside = (quantizer.codes(weight) > 0) & (quantizer.codes(weight) < 15)
    assert bool(((result > weight) == up)[inside].all())
    step = quantizer.scale[:, None].expand_as(weight)
    assert bool(((result - weight).abs() <= step * 1.0001)[inside].all())


def test_codes_are_hard_while_learning(quantizer: AdaRoundQuantizer, weight: Tensor) -> None:
    quantizer.begin_learning(weight)
    codes = quantizer.codes(weight)
    quantizer.finish_learning()
    assert torch.equal(quantizer.codes(weight), codes)
    restored = (codes - quantizer.zero_point[:, None]) * quantizer.scale[:, None]
    assert torch.equal(restored, quantizer(weight))


def test_regularizer_is_least_at_the_ends(quantizer: AdaRoundQuantizer, weight: Tensor) -> None:
    quantizer.begin_learning(weight)
    with torch.no_grad():
        quantizer.alpha.fill_(0)
    half = quantizer.rounding_regularizer(2.0)
    assert float(half.detach()) == pytest.approx(weight.numel(), rel=1e-5)
    with torch.no_grad():
        quantizer.alpha.fill_(10)
    assert quantizer.rounding_regularizer(20.0).item() == 0


def test_regularizer_pushes_away_from_a_half(quantizer: AdaRoundQuantizer, weight: Tensor) -> None:
    quantizer.begin_learning(weight)
    before = quantizer.rounding_share().detach()
    optimizer = torch.optim.Adam([quantizer.alpha], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        quantizer.rounding_regularizer(2.0).backward()
        optimizer.step()
    after = quantizer.rounding_share().detach()
    assert bool(((after < 0.05) | (after > 0.95)).all())
    assert torch.equal(after > 0.5, before > 0.5)


def test_forgotten_once_the_weights_are_on_the_grid(
    quantizer: AdaRoundQuantizer, weight: Tensor
) -> None:
    quantizer.begin_learning(weight)
    with torch.no_grad():
        quantizer.alpha.add_(torch.randn(weight.shape))
    quantizer.finish_learning()
    learned = quantizer(weight)
    quantizer.forget_learning()
    assert not quantizer.has_learned
    assert torch.equal(quantizer(learned), learned)


def test_learned_state_goes_into_a_fresh_one(quantizer: AdaRoundQuantizer, weight: Tensor) -> None:
    quantizer.begin_learning(weight)
    with torch.no_grad():
        quantizer.alpha.add_(torch.randn(weight.shape))
    quantizer.finish_learning()
    fresh = AdaRoundQuantizer(Grid(4), "MinMaxObserver", 0)
    fresh.load_state_dict(quantizer.state_dict())
    assert fresh.rounding == "hard"
    assert torch.equal(fresh(weight), quantizer(weight))


def test_learning_out_of_order(quantizer: AdaRoundQuantizer, weight: Tensor) -> None:
    quantizer.name = "lin1.weight_quantizer"
    with pytest.raises(CalibrationError, match=r"lin1\.weight_quantizer .*begin_learning"):
        quantizer.finish_learning()
    with pytest.raises(CalibrationError, match="begin_learning"):
        quantizer.rounding_regularizer(2.0)
    with pytest.raises(CalibrationError, match="calibrate"):
        AdaRoundQuantizer(Grid(4)).begin_learning(weight)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_values_on_the_grid_survive_learning(bits: int) -> None:
    """A weight that is a grid point already has a rounding variable at the very edge."""
    quantizer = AdaRoundQuantizer(Grid(bits, symmetric=True), "MinMaxObserver", 0)
    weight = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).float().repeat(2, 1)
    quantizer.mode = Mode.OBSERVE
    quantizer(weight)
    quantizer.mode = Mode.QUANTIZE
    quantizer.begin_learning(weight)
    assert bool(torch.isfinite(quantizer.alpha).all())
    quantizer.rounding_regularizer(2.0).backward()
    assert quantizer.alpha.grad is not None
    assert bool(torch.isfinite(quantizer.alpha.grad).all())
