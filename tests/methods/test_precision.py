"""Precision of matrix products: bfloat16 where asked for, and put back afterwards."""

import pytest
import torch

from ptq4sam.errors import ConfigError
from ptq4sam.methods.precision import product_precision

CPU = torch.device("cpu")


def test_products_are_bfloat16_within_and_float32_after() -> None:
    x = torch.randn(4, 4)
    with product_precision("bfloat16", CPU):
        assert (x @ x).dtype == torch.bfloat16
        assert x.softmax(-1).dtype == torch.float32
    assert (x @ x).dtype == torch.float32


def test_float32_changes_nothing() -> None:
    x = torch.randn(4, 4)
    expected = x @ x
    with product_precision("float32", CPU):
        assert torch.equal(x @ x, expected)


def test_tf32_needs_a_gpu() -> None:
    with (
        pytest.raises(ConfigError, match="tf32 was asked for on cpu"),
        product_precision("tf32", CPU),
    ):
        pass
