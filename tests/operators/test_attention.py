"""Quantized attention in pieces gives what it gives whole."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ptq4sam.model.calibration import CalibrationItem
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.operators import attention, bias
from ptq4sam.operators.attention_products import biased
from ptq4sam.operators.bias import RelativePositions
from ptq4sam.quantization import whole
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


@pytest.mark.parametrize(("bits", "dtype"), [(8, torch.float32), (16, torch.float64)])
def test_positions_of_many_steps_are_exact(
    bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """65,535 steps of 64 channels times digits of 64 are more than float32 holds."""
    size, head_dim = 4, 64
    generator = torch.Generator().manual_seed(1)
    table_h, table_w = torch.randn(2, 2 * size - 1, head_dim, generator=generator)
    largest = 2**bits - 1
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(-largest, largest + 1, (1, 1, size**2, head_dim), generator=generator)
    # All of one sign and of the largest size, in step with the table.
    steps[0, 0, 0] = largest * table_h[size - 1].sign()
    positions = RelativePositions(table_h, table_w, (size, size))
    multiplied: list[torch.dtype] = []
    plain = bias.position_terms

    def watched(query: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        multiplied.append(query.dtype)
        return plain(query, *others)

    monkeypatch.setattr(bias, "position_terms", watched)
    terms = positions.of_steps(steps.float(), torch.tensor(0.01), largest, slice(None), 0, size)
    found = biased(torch.zeros(1, 1, size**2, size**2), torch.tensor(1.0), terms)
    assert set(multiplied) == {dtype}
    expected = plain(steps.double(), tuple(t.double() for t in positions.tables))
    joined = bias.joined_terms(*expected, 1) * 0.01
    assert found.dtype == torch.float32
    assert ((found - joined).abs().max() / joined.abs().max()).item() < 1e-6


def test_convolutions_by_windows_give_the_bits_of_torchs_own(
    sam: Sam,
    items: list[CalibrationItem],
    make_scheme: Callable[..., Scheme],
    forward: Callable[[Sam], tuple[Tensor, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a GPU computes the patch embedding and the neck."""
    quantized = quantize_sam(sam, items[:1], make_scheme(8))
    expected = forward(quantized)
    monkeypatch.setattr(whole, "_has_direct_convolutions", lambda _device: False)
    # A copy has made no convolutions yet.
    assert all(map(torch.equal, forward(copy.deepcopy(quantized)), expected))
