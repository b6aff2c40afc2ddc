"""Linear attention on whole numbers: exact, near the float one, within the range of values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptq4sam.operators.arithmetic import Arithmetic, learning
from ptq4sam.operators.linear_attention import (
    QuantizedReluLinearAttention,
    ReluLinearAttention,
    largest_value,
)
from ptq4sam.quantization.affine import FixedQuantizer
from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.modes import quantizer_mode
from ptq4sam.quantization.quantizers import LSQQuantizer, Mode


def operands(places: int = 300, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, 3, places, 16, generator=generator) * size + shift
        for size, shift in ((1.0, 0.3), (spread, 0.1), (2.0, 0.5))
    )
    return query, key, value


def quantized(
    given: tuple[Tensor, Tensor, Tensor], bits: int, symmetric: bool = False
) -> QuantizedReluLinearAttention:
    wide = Grid(min(16, 2 * bits), symmetric=True)
    grids = [Grid(bits, symmetric), Grid(bits, symmetric), Grid(bits, symmetric), wide]
    core = QuantizedReluLinearAttention(ReluLinearAttention(), *map(FixedQuantizer, grids))
    with quantizer_mode(core, Mode.OBSERVE):
        core(*given)
    return core


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Every query's shares of all keys, in float64."""
    shares = query.double().relu() @ key.double().relu().transpose(-1, -2)
    return shares / (shares.sum(-1, keepdim=True) + 1e-15) @ value.double()


@torch.no_grad()
def test_it_is_a_weighted_mean_of_values() -> None:
    given = operands()
    torch.testing.assert_close(
        ReluLinearAttention()(*given).double(), plain(*given), atol=1e-5, rtol=0
    )
    # A query without a positive number attends to nothing.
    query = -given[0].abs()
    assert not ReluLinearAttention()(query, *given[1:]).any()
    assert not quantized(given, 8)(query, *given[1:]).any()


@torch.no_grad()
@pytest.mark.parametrize("symmetric", [True, False])
def test_more_bits_come_closer(symmetric: bool) -> None:
    given = operands()
    expected = plain(*given)
    errors = [
        float((quantized(given, bits, symmetric)(*given) - expected).norm() / expected.norm())
        for bits in (4, 6, 8)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.03


@torch.no_grad()
@pytest.mark.parametrize("places", [20, 1100])
def test_whole_numbers_are_those_of_int64_and_near_scaled_values(places: int) -> None:
    """Of 1100 places and 8 bits float32 does not hold the sums."""
    given = operands(places)
    core = quantized(given, 8)
    found = core(*given)
    core.arithmetic = Arithmetic.INTEGER
    assert core(*given).equal(found)
    with learning(core):
        torch.testing.assert_close(core(*given), found, atol=2e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_attends_stays_within_the_range_of_values(bits: int) -> None:
    """Also of queries whose shares are next to nothing, on a coarse grid."""
    query, key, value = operands()
    core = quantized((query, key, value), bits)
    few = query.clone()
    few[..., 1:] = 0
    key[..., 0] *= 0.02
    attended = core(few, key, value)
    assert attended.isfinite().all()
    assert attended.abs().max() <= largest_value(core.value_quantizer) * (1 + 1e-6)


def test_scales_are_learned_with_finite_gradients() -> None:
    given = operands(20)
    grids = [Grid(4), Grid(4), Grid(4), Grid(8, symmetric=True)]
    core = QuantizedReluLinearAttention(ReluLinearAttention(), *map(LSQQuantizer, grids))
    with quantizer_mode(core, Mode.OBSERVE):
        core(*given)
    query = given[0].clone()
    query[:, :, 3] = -1
    with learning(core):
        core(query, *given[1:]).square().sum().backward()
    for slot, quantizer in core.slots().items():
        assert quantizer.scale.grad is not None, slot
        assert quantizer.scale.grad.isfinite().all(), slot
        assert quantizer.scale.grad != 0, slot
