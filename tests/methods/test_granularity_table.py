from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from ptq4sam.methods.adaptive_granularity import AdaptiveGranularityQuantizer
from ptq4sam.methods.granularity_table import (
    ENTRY_BITS,
    MOST_BITS,
    fraction_bits,
    point_table,
)
from ptq4sam.operators.attention_products import values_worth
from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.quantizers import FixedQuantizer, Mode
from ptq4sam.quantization.whole import EXACT

BITS, TAUS = [4, 6, 8], [1, 2, 4]


def quantizer(bits: int, tau: int, scale: float) -> AdaptiveGranularityQuantizer:
    found = AdaptiveGranularityQuantizer(Grid(bits), taus=[tau])
    found.merge((torch.tensor([scale], dtype=torch.float64), torch.tensor([0.0])))
    return found.requires_grad_(False)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("fraction", [15, 20, MOST_BITS])
def test_points_by_shift_and_table(bits: int, tau: int, fraction: int) -> None:
    levels = 1 << bits
    table = point_table(levels, tau, fraction)
    exact = 2.0**fraction * torch.exp2(-torch.arange(levels, dtype=torch.float64) / tau)
    assert (table[:-1] - exact).abs().max() <= 0.5 + 2.0 ** (fraction - ENTRY_BITS - 1)
    assert int(table[-1]) == 0
    assert torch.equal(table.float().long(), table)
    entries = [round(2 ** (ENTRY_BITS - r / tau)) for r in range(tau)]
    shifted = [
        round(Fraction(entries[code % tau] << fraction, 2 ** (code // tau + ENTRY_BITS)))
        for code in range(levels)
    ]
    assert table[:-1].tolist() == shifted


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("scale", [0.02, 0.3, 1.0])
def test_steps_are_the_points_of_the_codes(bits: int, tau: int, scale: float) -> None:
    agq = quantizer(bits, tau, scale)
    attention = torch.randn(300, 500, generator=torch.Generator().manual_seed(0)).mul(3).softmax(-1)
    steps = agq(attention, steps=True)
    used = agq.fraction_bits()
    table = point_table(1 << bits, tau, used)
    assert torch.equal(steps.long(), table[agq.codes(attention).long()])
    difference = (steps * agq.step - agq(attention)).abs()
    # While it learns, logarithms are float32: codes in the middle of two may be others then.
    others = difference > scale * (0.51 * 2.0**-used + 1e-6)
    assert others.double().mean() < 1e-4


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("keys", [4, 1000, 8_192])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 8.0])
def test_no_sum_is_larger_than_said(bits: int, tau: int, keys: int, sharpness: float) -> None:
    noise = torch.randn(20, keys, generator=torch.Generator().manual_seed(0))
    attention = noise.mul(sharpness).softmax(-1)
    agq = quantizer(bits, tau, 0.9 * float(attention.max()))
    value = FixedQuantizer(Grid(bits))
    value.mode = Mode.OBSERVE
    value(torch.tensor([0.0, 1.0]))
    value.mode = Mode.QUANTIZE
    largest = values_worth(agq, value).largest
    steps = agq(attention, steps=True).double()
    assert steps.sum(-1).max() * value.grid.largest_step <= largest
    narrow = fraction_bits(1 << bits, tau, float(agq.scale)) < MOST_BITS
    assert (largest <= EXACT) == narrow
    assert largest < 2**53


@pytest.mark.parametrize("tau", TAUS)
def test_codes_are_those_of_a_logarithm_for_every_mantissa(tau: int) -> None:
    agq = quantizer(8, tau, 1.0)
    bits = torch.arange(1 << 23, dtype=torch.int32)
    for exponent in (0, -1, -7):
        x = ((bits + ((127 + exponent) << 23)).view(torch.float32)).clamp(max=1)
        wanted = (-tau * x.double().log2()).round().to(torch.int32)
        assert torch.equal(agq.codes(x), wanted)


def test_what_is_tiny_or_no_number_has_an_end_code() -> None:
    agq = quantizer(4, 2, 0.5)
    x = torch.tensor([0.0, 1e-38, 1e-20, 0.5, 3e38, torch.inf, torch.nan])
    assert agq.codes(x).tolist() == [16, 16, 16, 0, 0, 0, 0]
    assert agq.steps(x)[-1].isnan()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("scale", [1.0, 0.3, 0.001])
def test_steps_are_those_of_the_table_of_points(bits: int, tau: int, scale: float) -> None:
    agq = quantizer(bits, tau, scale)
    exponents = torch.linspace(-(1 << bits) / tau - 3, 2, 20_001)
    # Subnormal numbers are below the smallest attention.
    x = scale * torch.exp2(exponents.clamp(min=-100))
    table = point_table(1 << bits, tau, fraction_bits(1 << bits, tau, scale))
    assert torch.equal(agq.steps(x).long(), table[agq.codes(x).long()])
