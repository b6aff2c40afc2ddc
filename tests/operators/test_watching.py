"""Products are seen however they are called, and compiled kernels are left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ptq4sam.model.audit import audit
from ptq4sam.model.calibration import CalibrationItem
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.operators.watching import ProductWatch, unwatched
from ptq4sam.quantization import fused
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam

X = torch.randn(3, 4, 4)
PRODUCTS: dict[str, Callable[[], Tensor]] = {
    "matmul": lambda: X @ X,
    "vector": lambda: X[0] @ X[0, 0],
    "linear": lambda: F.linear(X, X[0]),
    "linear with bias": lambda: F.linear(X, X[0], X[0, 0]),
    "einsum": lambda: torch.einsum("bij,bkj->bik", X, X),
    "int8": lambda: torch._int_mm(
        torch.ones(32, 32, dtype=torch.int8), torch.ones(32, 32, dtype=torch.int8)
    ),
    "conv1d": lambda: F.conv1d(X, X),
    "conv2d": lambda: F.conv2d(X[None], X[None]),
    "transposed": lambda: F.conv_transpose2d(X[None], X[:, :, None]),
    "attention": lambda: F.scaled_dot_product_attention(X, X, X),
    "bilinear": lambda: F.bilinear(X[0], X[0], torch.randn(2, 4, 4)),
    "multi-head attention": lambda: nn.MultiheadAttention(4, 2).eval()(X, X, X)[0],
}


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_product_is_seen(name: str, mode: Callable[[], Any]) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    with mode(), ProductWatch(lambda first, second, _: seen.append((first, second))):
        PRODUCTS[name]()
    assert seen
    assert all(isinstance(operand, Tensor) for operands in seen for operand in operands)


def test_sums_and_elementwise_products_are_none() -> None:
    seen: list[Tensor] = []
    with ProductWatch(lambda first, _second, _: seen.append(first)):
        (X * X + X).sum(), F.layer_norm(X, [4]), F.interpolate(X, 9), X.softmax(-1)
    assert not seen


def test_what_is_unwatched_is_not_seen() -> None:
    seen: list[Tensor] = []

    @unwatched()
    def kernel() -> Tensor:
        return X @ X

    kernel()
    with ProductWatch(lambda first, _second, _: seen.append(first)):
        kernel()
        with pytest.raises(ValueError, match="within"), unwatched():
            raise ValueError("within")
        assert not seen
        X @ X
    assert len(seen) == 1
    kernel()
    X @ X
    assert len(seen) == 1


def test_what_is_made_of_several_operations_leaves_the_watch_on() -> None:
    seen: list[Tensor] = []
    with torch.inference_mode(), ProductWatch(lambda first, _second, _: seen.append(first)):
        F.linear(X, X[0])
        with unwatched():
            X @ X
        assert len(seen) == 1
    assert not ProductWatch.active


def test_no_kernel_of_a_model_is_called_under_watch(
    sam: Sam,
    items: list[CalibrationItem],
    make_scheme: Callable[..., Scheme],
    forward: Callable[[Sam], tuple[Tensor, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A compiler that meets a dispatch mode never compiles that function again."""
    scheme = make_scheme()
    model = quantize_sam(sam, items[:1], scheme)
    watched: list[str] = []
    kernels: list[str] = []

    def call(kernel: Any, arguments: tuple[Any, ...]) -> Any:
        function = kernel._function
        kernels.append(function.__name__)
        if _get_current_dispatch_mode_stack():
            watched.append(function.__name__)
        return function(*arguments)

    monkeypatch.setattr(fused, "FEWEST_ELEMENTS", 0)
    monkeypatch.setattr(fused._compiler, "usable", lambda _kind: True)
    monkeypatch.setattr(fused._Kernel, "__call__", call)
    assert audit(model, lambda: forward(model)).passed
    assert {"_softmax", "_rescaled", "_norm_of_rows", "_gelu"} <= set(kernels)
    assert not watched
