from __future__ import annotations

import pytest
import torch
from torch import nn

from ptq4sam.errors import CalibrationError
from ptq4sam.methods.bimodal import channel_signs, fold_signs, is_bimodal
from ptq4sam.quantization.published import Methods


def keys(centre: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = centre * torch.randint(0, 2, (16,), generator=generator).mul(2).sub(1)
    return torch.randn(2, 100, 16, generator=generator) + centres


def test_two_peaks_and_one() -> None:
    assert is_bimodal(keys(5.0), Methods())
    assert not is_bimodal(keys(0.0), Methods())


def test_folding_leaves_one_peak() -> None:
    x = keys(5.0)
    assert not is_bimodal(x * channel_signs(x), Methods())


def test_only_the_first_element_of_the_batch_counts() -> None:
    x = keys(5.0)
    x[1] = 0
    assert is_bimodal(x, Methods())
    assert not is_bimodal(x.flip(0), Methods())


def test_peaks_need_a_height_and_a_distance() -> None:
    x = keys(5.0)
    assert not is_bimodal(x, Methods(peak_height=0.5))
    assert not is_bimodal(x, Methods(peak_distance=120))


def test_constant_activation() -> None:
    assert not is_bimodal(torch.full((1, 4, 4), 2.0), Methods())


def test_values_that_are_not_finite() -> None:
    x = keys(5.0)
    x[0, 0, 0] = float("inf")
    with pytest.raises(CalibrationError, match="observed values"):
        is_bimodal(x, Methods())


def test_a_mean_of_zero_keeps_the_channel() -> None:
    x = torch.zeros(2, 3, 4)
    x[..., 1], x[..., 2] = 1, -1
    x[0, 0, 3], x[0, 1, 3] = 2, -2
    assert channel_signs(x).tolist() == [1, 1, -1, 1]


@pytest.mark.parametrize("bias", [True, False])
def test_folding_does_not_move_the_float_output(bias: bool) -> None:
    torch.manual_seed(0)
    query, key = nn.Linear(8, 16, bias=bias), nn.Linear(8, 16, bias=bias)
    tokens, image = torch.randn(2, 5, 8), torch.randn(2, 30, 8)

    def logits() -> torch.Tensor:
        return (query(tokens) @ key(image).transpose(-1, -2)).detach()

    before, keys_before = logits(), key(image).detach()
    signs = channel_signs(keys_before)
    assert signs.min() == -1
    fold_signs(query, key, signs)
    torch.testing.assert_close(logits(), before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(key(image).detach(), keys_before * signs)
    assert channel_signs(key(image)).min() == 1
