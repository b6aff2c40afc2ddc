"""Arithmetic is a property of the model: no caller changes its bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ptq4sam.model.calibration import CalibrationItem
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.operators.arithmetic import Arithmetic, Operator, learning
from ptq4sam.operators.attention import QuantizedSoftmaxAttention, SoftmaxAttention
from ptq4sam.operators.bias import TableBias
from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.modes import quantizer_mode, quantizers
from ptq4sam.quantization.quantizers import FixedQuantizer, Mode
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam

Items = list[CalibrationItem]
MakeScheme = Callable[..., Scheme]


def encoded(sam: Sam, pixels: Tensor) -> Tensor:
    features: Tensor = sam.image_encoder(pixels)
    return features


def test_gradients_and_autocast_change_no_bits(
    sam: Sam, items: Items, make_scheme: MakeScheme
) -> None:
    quantized = quantize_sam(sam, items[:1], make_scheme(4))
    pixels = items[0].pixels
    with torch.no_grad():
        expected = encoded(quantized, pixels)
    assert torch.equal(encoded(quantized, pixels), expected)
    assert torch.equal(encoded(quantized, pixels.clone().requires_grad_()), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoded(quantized, pixels), expected)


def test_learning_has_gradients_and_ends(sam: Sam, items: Items, make_scheme: MakeScheme) -> None:
    quantized = quantize_sam(sam, items[:1], make_scheme(4))
    pixels = items[0].pixels.clone().requires_grad_()
    expected = encoded(quantized, pixels)
    assert not expected.requires_grad
    with learning(quantized.image_encoder):
        found = encoded(quantized, pixels)
        (gradient,) = torch.autograd.grad(found.sum(), pixels)
    assert float(gradient.abs().max()) > 0
    assert not torch.equal(found, expected)
    operators = [m for m in quantized.modules() if isinstance(m, Operator)]
    assert {operator.arithmetic for operator in operators} == {Arithmetic.WHOLE}
    assert torch.equal(encoded(quantized, pixels), expected)


def test_a_reconstruction_learns_with_gradients(
    sam: Sam, items: Items, make_scheme: MakeScheme
) -> None:
    """Without `learning` no scale would move."""
    scheme = make_scheme(3, steps=20, recon={"scale_lr": 0.01})
    learned = dict(quantizers(quantize_sam(sam, items[:1], scheme)))
    calibrated = dict(quantizers(quantize_sam(sam, items[:1], make_scheme(3))))
    moved = [
        name for name, q in learned.items() if not torch.equal(q.scale, calibrated[name].scale)
    ]
    assert len(moved) > len(learned) / 3


@pytest.fixture
def attention() -> tuple[SoftmaxAttention, QuantizedSoftmaxAttention]:
    source = SoftmaxAttention(0.25)
    quantized = QuantizedSoftmaxAttention(source, *(FixedQuantizer(Grid(8)) for _ in range(4)))
    return source, quantized


def test_a_bias_by_table_is_added(
    attention: tuple[SoftmaxAttention, QuantizedSoftmaxAttention],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With heads of another width for values, in pieces and whole, float and quantized."""
    source, quantized = attention
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 2, 3, 9, 16, generator=generator)
    value = torch.randn(2, 3, 9, 24, generator=generator)
    table = 2 * torch.randn(3, 9, 9, generator=generator)
    expected = (query @ key.transpose(-1, -2) * 0.25 + table).softmax(-1) @ value
    bias = TableBias(table)
    torch.testing.assert_close(source(query, key, value, bias), expected, rtol=1e-4, atol=1e-5)
    with quantizer_mode(quantized, Mode.OBSERVE):
        quantized(query, key, value, bias)
    whole = quantized(query, key, value, bias)
    assert whole.shape == expected.shape
    assert float((whole - expected).norm() / expected.norm()) < 0.02
    monkeypatch.setattr("ptq4sam.operators.attention._SOFTMAX_BYTES", {"cpu": 1})
    assert torch.equal(quantized(query, key, value, bias), whole)
    monkeypatch.setattr("ptq4sam.operators.attention._BIAS_BYTES", {"cpu": 1})
    torch.testing.assert_close(source(query, key, value, bias), expected, rtol=1e-4, atol=1e-5)
