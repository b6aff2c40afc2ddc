from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ptq4sam.deploy import reference
from ptq4sam.deploy.reference import LONGEST_SUM, integer_model
from ptq4sam.errors import CalibrationError, DeployError
from ptq4sam.model.insertion import QuantizedSam, insert_quantizers
from ptq4sam.operators import arithmetic, attention_products, linear
from ptq4sam.operators.arithmetic import Arithmetic
from ptq4sam.operators.base import quantized_operators
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam

Forward = Callable[[Sam], tuple[Tensor, ...]]
Quantize = Callable[..., QuantizedSam]


def test_all_operators_sum_in_integers(quantize: Quantize) -> None:
    quantized = quantize(6)
    integer = integer_model(quantized)
    kinds = {operator.arithmetic for _, operator in quantized_operators(integer)}
    assert kinds == {Arithmetic.INTEGER}
    assert {o.arithmetic for _, o in quantized_operators(quantized)} == {Arithmetic.WHOLE}


def test_integers_are_summed(
    quantize: Quantize, forward: Forward, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reference that takes the simulation's sums would always agree."""
    quantized = quantize(6)
    expected = forward(quantized)
    plain = arithmetic.integer_product
    wrong = [linear, attention_products, arithmetic]
    for module in wrong:
        monkeypatch.setattr(module, "integer_product", lambda a, b: -plain(a, b))
    found = forward(integer_model(quantized))
    assert not any(map(torch.equal, found, expected))


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("agq", [True, False])
def test_gives_the_bits_of_the_simulation(
    quantize: Quantize,
    forward: Forward,
    bits: int,
    agq: bool,
) -> None:
    quantized = quantize(bits, ptq4sam={"BIG": True, "AGQ": agq})
    assert all(map(torch.equal, forward(integer_model(quantized)), forward(quantized)))


def test_gives_its_bits_on_two_threads(quantize: Quantize, forward: Forward) -> None:
    quantized, threads = quantize(6), torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(2, threads))
        assert all(map(torch.equal, forward(integer_model(quantized)), forward(quantized)))
    finally:
        torch.set_num_threads(threads)


def test_gives_its_bits_after_reconstruction(quantize: Quantize, forward: Forward) -> None:
    quantized = quantize(4, 3)
    assert all(map(torch.equal, forward(integer_model(quantized)), forward(quantized)))


def test_the_simulation_stays_as_it_was(quantize: Quantize, forward: Forward) -> None:
    quantized = quantize(4)
    before = {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
    integer = integer_model(quantized)
    forward(integer)
    with torch.no_grad():
        for parameter in integer.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[name], t) for name, t in quantized.state_dict().items())


def test_a_float_encoder_stays_float(quantize: Quantize, forward: Forward) -> None:
    quantized = quantize(4, encoder=False)
    integer = integer_model(quantized)
    assert torch.equal(forward(integer)[0], forward(quantized)[0])


def test_two_passes_are_equal(quantize: Quantize, forward: Forward) -> None:
    integer = integer_model(quantize(4))
    assert all(map(torch.equal, forward(integer), forward(integer)))


@pytest.mark.parametrize("which", ["w_qconfig", "a_qconfig"])
def test_wider_codes_are_refused_by_name(quantize: Quantize, which: str) -> None:
    wide = {
        "quantizer": "FixedFakeQuantize",
        "observer": "MinMaxObserver",
        "bit": 10,
        "ch_axis": 0 if which == "w_qconfig" else -1,
    }
    quantized = quantize(8, **{which: wide})
    with pytest.raises(DeployError, match=r"blocks\.0\.attn\.qkv has codes of 10 bits"):
        integer_model(quantized)


def test_without_calibration(sam: Sam, make_scheme: Callable[..., Scheme]) -> None:
    with pytest.raises(CalibrationError, match="calibrate the model first"):
        integer_model(insert_quantizers(sam, make_scheme()))


def test_no_sum_of_the_longest_kind_overflows_32_bits() -> None:
    # Official SAMs: second MLP layer of ViT-H, 3x3 convolution of the neck, keys at 1024 px.
    assert max(4 * 1280, 9 * 256, 64 * 64) <= LONGEST_SUM
    assert 4 * LONGEST_SUM * 2**16 <= 2**31 - 1 < 4 * (LONGEST_SUM + 1) * 2**16


def test_longer_sums_are_refused_by_name(
    quantize: Quantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "LONGEST_SUM", 100)
    with pytest.raises(DeployError, match="has codes of 8 bits and sums of 128 products"):
        integer_model(quantize(8))


def test_points_farther_than_a_byte_are_refused_by_name(quantize: Quantize) -> None:
    quantized = quantize(8, slots={"input@after-gelu": {"grid": "hybrid"}})
    with pytest.raises(DeployError, match=r"mlp\.lin2 has points up to 4095 steps away"):
        integer_model(quantized)
