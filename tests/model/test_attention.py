"""Quantized attention in pieces gives what it gives whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ptq4sam.model import attention
from ptq4sam.model.calibration import CalibrationItem
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam


@pytest.mark.parametrize("size", [1, 2000, 9000])
def test_pieces_make_the_whole(
    size: int,
    sam: Sam,
    items: list[CalibrationItem],
    make_scheme: Callable[..., Scheme],
    forward: Callable[[Sam], tuple[Tensor, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quantized = quantize_sam(sam, items, make_scheme(8))
    monkeypatch.setattr(attention, "_SOFTMAX_BYTES", {"cpu": 2**30})
    whole = forward(quantized)
    monkeypatch.setattr(attention, "_SOFTMAX_BYTES", {"cpu": size})
    for found, expected in zip(forward(quantized), whole, strict=True):
        # A rounding apart in a sum may tip a code.
        assert (found - expected).norm() < 1e-2 * expected.norm()
    x = torch.randn(2, 3, 3, 32)
    module = quantized.image_encoder.blocks[0].attn
    monkeypatch.setattr(attention, "_SOFTMAX_BYTES", {"cpu": 2**30})
    with torch.no_grad():
        expected = module(x)
        monkeypatch.setattr(attention, "_SOFTMAX_BYTES", {"cpu": size})
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)
