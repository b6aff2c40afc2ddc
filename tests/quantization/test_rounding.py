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


def regularizer(quantizer: AdaRoundQuantizer, beta: float) -> Tensor:
    """AdaRound, eq. 24."""
    return (1 - (2 * quantizer.rounding_share() - 1).abs() ** beta).sum()


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


@pytest.mark.parametrize("beta", [2.0, 3.5, 20.0])
def test_regularizer_gradient_is_that_of_the_regularizer(
    quantizer: AdaRoundQuantizer, weight: Tensor, beta: float
) -> None:
    quantizer.begin_learning(weight)
    with torch.no_grad():
        quantizer.alpha.add_(2 * torch.randn(weight.shape))
    (expected,) = torch.autograd.grad(
        0.01 * regularizer(quantizer, beta), quantizer.alpha.requires_grad_()
    )
    quantizer.add_regularizer_gradient_(*weight.new_tensor([0.01, beta]))
    torch.testing.assert_close(quantizer.alpha.grad, expected, rtol=1e-5, atol=1e-7)
    quantizer.add_regularizer_gradient_(*weight.new_tensor([0.01, beta]))
    torch.testing.assert_close(quantizer.alpha.grad, 2 * expected, rtol=1e-5, atol=1e-7)


def test_regularizer_pushes_away_from_a_half(quantizer: AdaRoundQuantizer, weight: Tensor) -> None:
    quantizer.begin_learning(weight)
    before = quantizer.rounding_share().detach()
    optimizer = torch.optim.Adam([quantizer.alpha], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        quantizer.add_regularizer_gradient_(*weight.new_tensor([1.0, 2.0]))
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
    quantizer.freeze()
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
        quantizer.add_regularizer_gradient_(*weight.new_tensor([1.0, 2.0]))
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
    quantizer.add_regularizer_gradient_(*weight.new_tensor([1.0, 2.0]))
    assert quantizer.alpha.grad is not None
    assert bool(torch.isfinite(quantizer.alpha.grad).all())
