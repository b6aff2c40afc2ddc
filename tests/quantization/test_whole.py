"""Products of whole numbers against int64 arithmetic."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ptq4sam.numerics import products_of
from ptq4sam.quantization import int8_products
from ptq4sam.quantization import whole as whole_module
from ptq4sam.quantization.fused import FEWEST_ELEMENTS
from ptq4sam.quantization.int8_products import (
    gives_exact_int8_products,
    has_int8_products,
    int8_shift,
)
from ptq4sam.quantization.whole import (
    WholeConvolution,
    WholeLinear,
    Windows,
    exact_pieces,
    rescaled,
    whole_product,
)
from tests.device_watch import host_reads
from tests.devices import on_devices

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:Please use the new API settings")


def whole(seed: int, *shape: int, largest: int = 255, device: torch.device = CPU) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator).float().to(device)


def exact(a: Tensor, b: Tensor) -> Tensor:
    """The product in int64, rounded to float32 once."""
    return (a.cpu().long() @ b.cpu().long()).float().to(a.device)


@pytest.fixture(params=["highest", "high"])
def float32_products(request: pytest.FixtureRequest) -> Iterator[str]:
    """As IEEE rounds them, and where torch may round factors."""
    with products_of(request.param):
        yield request.param


@on_devices
@pytest.mark.parametrize("terms", [64, 1000, 3072, 6000])
@pytest.mark.parametrize("largest", [15, 255, 65_535])
def test_linear_is_that_of_integers(
    terms: int, largest: int, float32_products: str, device: torch.device
) -> None:
    x = whole(0, 7, 3, terms, largest=largest, device=device)
    weight = whole(1, 40, terms, largest=largest, device=device)
    # All of one sign: the largest sums that there can be.
    weight[0], x[0, 0] = largest, largest
    assert torch.equal(WholeLinear(weight, -largest, largest)(x), exact(x, weight.t()))


@on_devices
@pytest.mark.parametrize(("low", "high"), [(-128, 127), (-100, 155), (0, 255), (-255, 0)])
@pytest.mark.parametrize("rows", [1, 16, 17, 300])
def test_int8_products_are_those_of_integers(
    low: int, high: int, rows: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where int8 cannot hold the inputs as they are, and where there are few of them."""
    monkeypatch.setattr(whole_module, "has_int8_products", lambda _weight: True)
    x = torch.randint(low, high + 1, (rows, 768), generator=torch.Generator().manual_seed(0))
    weight = whole(1, 64, 768, largest=127, device=device)
    weight[0], weight[1], x[0] = 127, -128, low
    x = x.float().to(device)
    product = WholeLinear(weight, low, high)
    assert product._shift is not None
    assert torch.equal(product(x), exact(x, weight.t()))
    assert product(x[:0]).shape == (0, 64)


@pytest.mark.parametrize("rows", [3, 40])
def test_int8_products_elsewhere_than_on_a_cpu(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be asked there, and rows are filled up, as a GPU's kernels want them."""
    given: list[tuple[int, ...]] = []
    multiply = torch._int_mm

    def watched(a: Tensor, b: Tensor) -> Tensor:
        given.append(tuple(a.shape))
        return multiply(a, b)

    monkeypatch.setattr(torch, "_int_mm", watched)
    monkeypatch.setattr(int8_products, "_asks_for_free", lambda _x: False)
    x, weight = whole(0, rows, 64, largest=200).abs(), whole(1, 8, 64, largest=127)
    x[1, 3] = torch.nan
    shift = int8_shift(0, 255)
    assert shift == 128
    shifted = shift * weight.sum(1).to(torch.int32)
    with host_reads() as reads:
        found = int8_products.int8_product(x, weight.to(torch.int8), shift, shifted)
    assert found is not None
    assert not reads
    assert given == [(max(32, rows), 64)]
    assert found[1].isnan().all()
    others = [row for row in range(rows) if row != 1]
    assert torch.equal(found[others], exact(x[others], weight.t()))


def test_a_gpu_multiplies_int8_where_shapes_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_products, "gives_exact_int8_products", lambda _device: True)
    for shape, allowed in (((64, 768), True), ((64, 770), False), ((65, 768), False)):
        weight = SimpleNamespace(device=torch.device("cuda", 0), shape=shape)
        assert has_int8_products(weight) is allowed  # type: ignore[arg-type]
    elsewhere = SimpleNamespace(device=torch.device("mps"), shape=(64, 768))
    assert not has_int8_products(elsewhere)  # type: ignore[arg-type]


def test_a_device_that_multiplies_int8_wrong_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = gives_exact_int8_products.__wrapped__
    assert ask(CPU)
    multiply = torch._int_mm
    # As processors do that add two products in 16 bits.
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: multiply(a, b).clamp(max=32_767 * 128))
    assert not ask(CPU)

    def missing(_a: Tensor, _b: Tensor) -> Tensor:
        raise RuntimeError("self.size(0) needs to be greater than 16")

    monkeypatch.setattr(torch, "_int_mm", missing)
    assert not ask(CPU)


@on_devices
def test_all_kinds_of_products_are_equal(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = whole(0, 2, 50, 304, largest=63, device=device)
    weight = whole(1, 40, 304, largest=63, device=device)
    monkeypatch.setattr(whole_module, "has_int8_products", lambda _weight: True)
    found = WholeLinear(weight, -63, 63)(x)
    monkeypatch.setattr(whole_module, "has_int8_products", lambda _weight: False)
    plain = WholeLinear(weight, -63, 63)
    assert torch.equal(found, plain(x))
    with products_of("high"):
        assert torch.equal(found, plain(x))


def test_products_with_rounded_factors_are_said_once_and_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole_module._tell_slow.cache_clear()
    monkeypatch.setattr(whole_module, "float32_products", lambda _device: "tf32")
    monkeypatch.setattr(whole_module, "has_int8_products", lambda _weight: False)
    seen: list[torch.dtype] = []
    linear = F.linear

    def watched(x: Tensor, weight: Tensor) -> Tensor:
        seen.append(x.dtype)
        return linear(x, weight)

    monkeypatch.setattr(F, "linear", watched)
    x, weight = whole(0, 5, 64, largest=4095), whole(1, 6, 64, largest=3)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(WholeLinear(weight, -4095, 4095)(x), exact(x, weight.t()))
    assert seen == [torch.float64] * 2
    assert caplog.text.count("float32 products on cpu are set to tf32") == 1
    assert whole_module.operand(x, 10.0).dtype == torch.float64


def test_a_product_shows_what_is_no_number() -> None:
    x, weight = whole(0, 4, 30, largest=15), whole(1, 6, 30, largest=15)
    x[2, 3] = torch.nan
    found = WholeLinear(weight, -15, 15)(x)
    assert found[2].isnan().all()
    assert found[[0, 1, 3]].isfinite().all()
    weight[1, 2] = torch.nan
    found = WholeLinear(weight, -15, 15)(x[:2])
    assert found[:, 1].isnan().all()
    assert found[:, [0, 2, 3, 4, 5]].isfinite().all()


@on_devices
def test_the_order_of_the_terms_does_not_matter(device: torch.device) -> None:
    x, weight = whole(0, 300, 3072, device=device), whole(1, 64, 3072, device=device)
    order = torch.randperm(3072, generator=torch.Generator().manual_seed(2)).to(device)
    found = WholeLinear(weight, -255, 255)(x)
    assert torch.equal(found, WholeLinear(weight[:, order], -255, 255)(x[:, order]))


def test_pieces_are_as_few_as_float32_needs() -> None:
    assert exact_pieces(torch.full((1, 1024), 64.0), 256) == 1
    assert exact_pieces(torch.full((1, 1025), 64.0), 256) == 2
    assert exact_pieces(torch.full((1, 64), 65_535.0), 65_535) == 0


@on_devices
@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("largest", [15, 255])
@pytest.mark.parametrize(
    ("kernel", "windows"),
    [
        ((1, 1), Windows()),
        ((3, 3), Windows(padding=(1, 1))),
        ((3, 2), Windows(stride=(2, 1), padding=(1, 0), dilation=(1, 2))),
        ((4, 4), Windows(stride=(4, 4))),
    ],
)
def test_convolution_is_that_of_integers(
    kernel: tuple[int, int],
    windows: Windows,
    largest: int,
    direct: bool,
    float32_products: str,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By torch's own on a CPU, by windows as rows of a matrix elsewhere."""
    if direct and device.type != "cpu":
        pytest.skip("torch's own convolutions of a GPU may round")
    monkeypatch.setattr(whole_module, "_has_direct_convolutions", lambda _device: direct)
    x = whole(0, 2, 64, 12, 20, largest=largest, device=device)
    weight = whole(1, 32, 64, *kernel, largest=largest, device=device)
    found = WholeConvolution(weight, -largest, largest, windows)(x)
    geometry = {
        "stride": windows.stride,
        "padding": windows.padding,
        "dilation": windows.dilation,
    }
    expected = F.conv2d(x.double(), weight.double(), **geometry).float()  # type: ignore[arg-type]
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@on_devices
@pytest.mark.parametrize("largest", [15, 255, 4095])
def test_products_are_those_of_integers(
    largest: int, float32_products: str, device: torch.device
) -> None:
    a = whole(0, 2, 30, 258, largest=largest, device=device)
    b = whole(1, 2, 258, 20, largest=largest, device=device)
    assert torch.equal(whole_product(a, b, 258.0 * largest**2), exact(a, b))


@on_devices
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("rows", [5, -(-FEWEST_ELEMENTS // 64)])
def test_product_and_bias_are_rounded_one_after_the_other(rows: int, device: torch.device) -> None:
    """As numpy rounds them, in compiled kernels too: a fused multiply-add would round once."""
    sums, scale, bias = whole(0, rows, 64, largest=2**20), torch.rand(64), torch.randn(64)
    product: np.ndarray = sums.numpy() * scale.numpy()  # type: ignore[type-arg]
    sums, scale = sums.to(device), scale.to(device)
    found = rescaled(sums, scale, bias.to(device)).cpu().numpy()
    assert np.array_equal(found, product + bias.numpy())
    assert np.array_equal(rescaled(sums, scale, None).cpu().numpy(), product)
