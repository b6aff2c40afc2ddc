from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from ptq4sam.deploy.codes import LogGrid, UniformGrid
from ptq4sam.deploy.integer.arithmetic import (
    FRACTION_BITS,
    LONGEST_SUM,
    SUM_BITS,
    SUM_FRACTION_BITS,
    GranularityTable,
    Requantizer,
    affine_product,
    require_narrow,
    round_sum,
    shift_right,
)
from ptq4sam.errors import DeployError
from ptq4sam.quantization.grid import Grid

INT32 = 2**31 - 1


def random_codes(seed: int, *shape: int, low: int = 0, high: int = 256) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator, dtype=torch.int32)


class TestAffineProduct:
    def test_equals_the_product_of_centred_int64(self) -> None:
        a, b = random_codes(0, 2, 30, 500), random_codes(1, 2, 500, 40)
        zero = random_codes(2, 40)
        found = affine_product(a, b, 131, zero, torch.int32)
        assert found.dtype == torch.int32
        assert torch.equal(found.long(), (a.long() - 131) @ (b.long() - zero))
        rows = random_codes(3, 30, 1)
        found = affine_product(a, b, rows, 7, torch.int32)
        assert torch.equal(found.long(), (a.long() - rows) @ (b.long() - 7))

    def test_equals_torchs_int8_product(self) -> None:
        a, b = random_codes(0, 64, 512), random_codes(1, 512, 48)
        found = affine_product(a, b, 128, 128, torch.int32)
        assert torch.equal(found, torch._int_mm((a - 128).char(), (b - 128).char()))

    @pytest.mark.parametrize("code", [0, 255])
    @pytest.mark.parametrize("zero", [0, 255])
    def test_no_sum_of_the_longest_kind_overflows(self, code: int, zero: int) -> None:
        a = torch.full((1, LONGEST_SUM), code, dtype=torch.int32)
        b = torch.full((LONGEST_SUM, 1), 255, dtype=torch.int32)
        found = affine_product(a, b, zero, 0, torch.int32)
        assert int(found) == LONGEST_SUM * (code - zero) * 255

    def test_four_terms_of_the_longest_sum_fit_into_32_bits(self) -> None:
        assert 4 * LONGEST_SUM * 2**16 <= INT32 < 4 * (LONGEST_SUM + 1) * 2**16
        # Official SAMs: second MLP layer of ViT-H, 3x3 convolution of the neck, keys at 1024 px.
        assert max(4 * 1280, 9 * 256, 64 * 64) <= LONGEST_SUM

    def test_wider_codes_and_longer_sums_are_refused(self) -> None:
        require_narrow("layer", UniformGrid(1.0, 0, Grid(8)), terms=LONGEST_SUM)
        with pytest.raises(DeployError, match="layer has codes of 9 bits"):
            require_narrow("layer", UniformGrid(1.0, 0, Grid(9)))
        with pytest.raises(DeployError, match="sums of 8192 products"):
            require_narrow("layer", UniformGrid(1.0, 0, Grid(8)), terms=LONGEST_SUM + 1)


class TestRequantizer:
    GRID = UniformGrid(0.1, 100, Grid(8))

    def exact(self, accumulator: int, factor: float, bias: float) -> int:
        """round(accumulator * factor + bias) + zero point, in fractions."""
        code = round(Fraction(accumulator) * Fraction(factor) + Fraction(bias)) + 100
        return min(255, max(0, code))

    @pytest.mark.parametrize("factor", [3e-9, 1.7e-5, 0.0031, 0.42197, 9.0])
    @pytest.mark.parametrize("bits", [31, SUM_BITS])
    def test_rounds_as_fractions_do(self, factor: float, bits: int) -> None:
        factors = torch.tensor([factor, 1.3 * factor], dtype=torch.float64)
        biases = torch.tensor([-17.3, 40.02], dtype=torch.float64)
        requantizer = Requantizer(factors, biases, [self.GRID], bits)
        reach = min(2**bits - 1, int(200 / factor))
        generator = torch.Generator().manual_seed(4)
        drawn = torch.rand(2000, 2, generator=generator, dtype=torch.float64)
        sums = ((2 * drawn - 1) * reach).long()
        sums[0], sums[1] = 2**bits - 1, 1 - 2**bits
        found = requantizer(sums)
        assert found.dtype == torch.int32
        channels = list(zip(factors.tolist(), biases.tolist(), strict=True))
        expected = [
            [self.exact(s, *channel) for s, channel in zip(row, channels, strict=True)]
            for row in sums.tolist()
        ]
        different = (found - torch.tensor(expected)).abs()
        assert different.max() <= 1
        # Codes differ only where the fraction is nearly a half: a multiplier of 24 bits is as
        # exact as float32.
        assert different.sum() <= (0 if bits == 31 else 1)

    def test_half_goes_to_the_even_code(self) -> None:
        half = Requantizer(torch.tensor(0.5, dtype=torch.float64), None, [self.GRID])
        found = half(torch.arange(-4, 5))
        assert found.tolist() == [100 + round(s / 2) for s in range(-4, 5)]
        assert (found - 100).tolist() == torch.round(torch.arange(-4, 5) / 2).tolist()

    def test_several_grids_share_the_channels(self) -> None:
        grids = [UniformGrid(1.0, 3, Grid(4)), UniformGrid(1.0, 0, Grid(4, symmetric=True))]
        ones = torch.ones(4, dtype=torch.float64)
        found = Requantizer(ones, None, grids)(torch.tensor([[-100] * 4, [0] * 4, [100] * 4]))
        assert found.tolist() == [[0, 0, -8, -8], [3, 3, 0, 0], [15, 15, 7, 7]]

    def test_a_large_bias_that_sums_outweigh(self) -> None:
        factor = torch.tensor([1e-3], dtype=torch.float64)
        bias = torch.tensor([-2e6], dtype=torch.float64)
        found = Requantizer(factor, bias, [self.GRID])(torch.tensor([[2_000_012_345]]))
        assert int(found) == 100 + 12

    def test_an_output_grid_without_meaning_is_refused(self) -> None:
        with pytest.raises(DeployError, match="the output of lin1 is up to"):
            Requantizer(torch.tensor(1e12, dtype=torch.float64), None, [self.GRID], name="lin1")


def test_shift_rounds_half_to_even() -> None:
    numbers = torch.arange(-40, 41)
    for places in (1, 2, 3):
        expected = [round(Fraction(n, 2**places)) for n in numbers.tolist()]
        assert shift_right(numbers, places).tolist() == expected


class TestGranularity:
    @pytest.mark.parametrize("tau", [1, 2, 4])
    @pytest.mark.parametrize("bits", [4, 6, 8])
    def test_points_by_shift_and_table(self, tau: int, bits: int) -> None:
        table = GranularityTable(LogGrid(1.0, tau, Grid(bits)))
        codes = np.arange(1 << bits)
        exact = 2.0**FRACTION_BITS * 2.0 ** (-codes / tau)
        error = np.abs(table(torch.from_numpy(codes)).numpy() - exact)
        assert error.max() <= 0.75
        if tau == 1:
            assert error[: FRACTION_BITS + 1].max() == 0
        assert int(table(torch.tensor(1 << bits))) == 0

    @pytest.mark.parametrize("tau", [1, 2, 4])
    def test_sums_are_within_their_bound(self, tau: int) -> None:
        keys, bits = 4096, 8
        codes = random_codes(0, 8, keys, high=257)
        value = random_codes(1, keys, 16)
        table = GranularityTable(LogGrid(1.0, tau, Grid(bits)))
        sums = affine_product(table(codes), value, 0, 97, torch.int64)
        assert torch.equal(sums, table(codes) @ (value.long() - 97))
        points = 2.0 ** (-codes.double() / tau) * (codes < 256)
        exact = points @ (value.double() - 97)
        error = (sums.double() / 2**FRACTION_BITS - exact).abs()
        assert error.max() <= 0.75 * 255 * keys / 2**FRACTION_BITS < 7.4e-4
        rounded = round_sum(sums).double() / 2**SUM_FRACTION_BITS
        assert (rounded - exact).abs().max() <= error.max() + 2 ** -(SUM_FRACTION_BITS + 1)

    def test_the_largest_sum_keeps_to_its_bits(self) -> None:
        largest = LONGEST_SUM * 255 << FRACTION_BITS
        assert largest < 2**53  # float64 holds it and every partial sum
        assert round_sum(torch.tensor(largest)) < 2**SUM_BITS
        assert SUM_BITS + 24 == 62
