"""Parts of the image encoder against plain formulas."""

from __future__ import annotations

import pytest
import torch

from ptq4sam.families.sam_vit.image_encoder import Attention, window_partition, window_unpartition
from ptq4sam.operators import attention as operator
from ptq4sam.operators.bias import relative_table


@pytest.fixture
def attention() -> Attention:
    torch.manual_seed(0)
    module = Attention(24, 3, qkv_bias=True, use_rel_pos=True, input_size=(6, 6))
    torch.nn.init.normal_(module.rel_pos_h)
    torch.nn.init.normal_(module.rel_pos_w)
    return module


def test_attention_equals_its_formula(attention: Attention) -> None:
    x = torch.randn(2, 6, 6, 24)
    query, key, value = attention.split_heads(attention.qkv(x))
    logits = query @ key.transpose(-1, -2) * attention.core.scale
    for i in range(36):
        for j in range(36):
            row, column = i // 6 - j // 6 + 5, i % 6 - j % 6 + 5
            vector = attention.rel_pos_h[row] + attention.rel_pos_w[column]
            logits[:, :, i, j] += query[:, :, i] @ vector
    expected = attention.proj(attention.merge_heads(logits.softmax(-1) @ value, (6, 6)))
    torch.testing.assert_close(attention(x), expected, rtol=1e-4, atol=1e-5)


def test_attention_in_pieces_equals_the_whole(
    attention: Attention, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(2, 6, 6, 24, requires_grad=True)
    whole = attention(x)
    (whole_gradient,) = torch.autograd.grad(whole.square().sum(), x)
    # Two rows are 2 * 3 * 12 * 36 floats; a budget of 4 rows leaves an uneven last piece.
    monkeypatch.setitem(operator._BIAS_BYTES, "cpu", 4 * 2 * 3 * 6 * 36 * 4)
    pieces = attention(x)
    (gradient,) = torch.autograd.grad(pieces.square().sum(), x)
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, whole_gradient, rtol=1e-4, atol=1e-5)


def test_attention_without_positions_is_plain() -> None:
    torch.manual_seed(0)
    module = Attention(8, 2, qkv_bias=False, use_rel_pos=False, input_size=(3, 3))
    x = torch.randn(1, 3, 3, 8)
    query, key, value = module.split_heads(module.qkv(x))
    weights = (query @ key.transpose(-1, -2) * 4**-0.5).softmax(-1)
    expected = module.proj(module.merge_heads(weights @ value, (3, 3)))
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize(("size", "padded"), [((64, 64), 70), ((32, 32), 32), ((9, 13), None)])
def test_windows_come_back(size: tuple[int, int], padded: int | None) -> None:
    window = 14 if padded != 32 else 8
    x = torch.randn(2, *size, 5)
    windows = window_partition(x, window)
    if padded:
        assert windows.shape[0] == 2 * (padded // window) ** 2
    assert windows.shape[1:3] == (window, window)
    # Nothing but zeros is added.
    torch.testing.assert_close(windows.sum(), x.sum(), rtol=1e-4, atol=1e-3)
    assert window_unpartition(windows, window, x.shape).equal(x)


def test_relative_table_of_another_size_is_interpolated() -> None:
    table = torch.arange(5.0)[:, None]  # made for 3 positions
    assert relative_table(table, 3)[:, :, 0].tolist() == [[2, 1, 0], [3, 2, 1], [4, 3, 2]]
    resized = relative_table(table, 5)[:, :, 0]
    # Nine values between 0 and 4, symmetric about 2, constant along diagonals.
    assert resized.diagonal().tolist() == pytest.approx([2] * 5)
    assert resized[4, 0] + resized[0, 4] == pytest.approx(4)
    assert resized[4, 0] > resized[3, 0] > 2
