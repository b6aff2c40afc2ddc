from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptq4sam.deploy.codes import UniformGrid
from ptq4sam.deploy.integer.arithmetic import LONGEST_SUM, affine_product, require_narrow
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
