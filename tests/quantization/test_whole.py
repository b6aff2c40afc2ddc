"""Products of whole numbers against int64 arithmetic."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ptq4sam.quantization import whole as whole_module
from ptq4sam.quantization.fused import FEWEST_ELEMENTS
from ptq4sam.quantization.whole import (
    exact_pieces,
    has_int8_products,
    rescaled,
    whole_convolution,
    whole_linear,
    whole_product,
)


def whole(seed: int, *shape: int, largest: int = 255) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator).float()


def exact(a: Tensor, b: Tensor) -> Tensor:
    """The product in int64, rounded to float32 once."""
    return (a.long() @ b.long()).float()


@pytest.mark.parametrize("terms", [64, 1000, 3072, 6000])
@pytest.mark.parametrize("largest", [15, 255, 65_535])
def test_linear_is_that_of_integers(terms: int, largest: int) -> None:
    x, weight = whole(0, 7, 3, terms, largest=largest), whole(1, 40, terms, largest=largest)
    # All of one sign: the largest sums that there can be.
    weight[0], x[0, 0] = largest, largest
    assert torch.equal(whole_linear(x, weight, largest), exact(x, weight.t()))


@pytest.mark.parametrize("terms", [3, 768, 3072])
@pytest.mark.parametrize("sign", [-1, 1])
def test_int8_products_are_those_of_integers_at_their_largest(terms: int, sign: int) -> None:
    if not has_int8_products(torch.device("cpu")):
        pytest.skip("this processor has no int8 products")
    x, weight = torch.full((9, terms), 127.0), torch.full((5, terms), sign * 127.0)
    x[1] = -128
    assert torch.equal(whole_linear(x, weight, 128), exact(x, weight.t()))


def test_both_kinds_of_products_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = whole(0, 2, 50, 300, largest=63), whole(1, 40, 300, largest=63)
    found = whole_linear(x, weight, 63)
    monkeypatch.setattr(whole_module, "has_int8_products", lambda device: False)
    assert torch.equal(found, whole_linear(x, weight, 63))


def test_a_product_shows_what_is_no_number() -> None:
    x, weight = whole(0, 4, 30, largest=15), whole(1, 6, 30, largest=15)
    x[2, 3] = torch.nan
    found = whole_linear(x, weight, 15)
    assert found[2].isnan().all()
    assert found[[0, 1, 3]].isfinite().all()


def test_the_order_of_the_terms_does_not_matter() -> None:
    x, weight = whole(0, 300, 3072), whole(1, 64, 3072)
    order = torch.randperm(3072, generator=torch.Generator().manual_seed(2))
    found = whole_linear(x, weight, 255)
    assert torch.equal(found, whole_linear(x[:, order], weight[:, order], 255))


def test_pieces_are_as_few_as_float32_needs() -> None:
    assert exact_pieces(torch.full((1, 1024), 64.0), 256) == 1
    assert exact_pieces(torch.full((1, 1025), 64.0), 256) == 2
    assert exact_pieces(torch.full((1, 64), 65_535.0), 65_535) == 0


@pytest.mark.parametrize("largest", [15, 255])
@pytest.mark.parametrize(("kernel", "padding"), [(1, 0), (3, 1)])
def test_convolution_is_that_of_integers(largest: int, kernel: int, padding: int) -> None:
    x = whole(0, 1, 256, 20, 20, largest=largest)
    weight = whole(1, 32, 256, kernel, kernel, largest=largest)
    found = whole_convolution(partial(F.conv2d, padding=padding), x, weight, largest)
    windows = F.unfold(x, kernel, padding=padding)
    assert torch.equal(found.flatten(2), exact(weight.flatten(1), windows))


@pytest.mark.parametrize("largest", [15, 255, 4095])
def test_products_are_those_of_integers(largest: int) -> None:
    a, b = whole(0, 2, 30, 258, largest=largest), whole(1, 2, 258, 20, largest=largest)
    assert torch.equal(whole_product(a, b, 258.0 * largest**2), exact(a, b))


@pytest.mark.parametrize("rows", [5, -(-FEWEST_ELEMENTS // 64)])
def test_product_and_bias_are_rounded_one_after_the_other(rows: int) -> None:
    """As numpy rounds them, in compiled kernels too: a fused multiply-add would round once."""
    sums, scale, bias = whole(0, rows, 64, largest=2**20), torch.rand(64), torch.randn(64)
    product: np.ndarray = sums.numpy() * scale.numpy()  # type: ignore[type-arg]
    assert np.array_equal(rescaled(sums, scale, bias).numpy(), product + bias.numpy())
    assert np.array_equal(rescaled(sums, scale, None).numpy(), product)
