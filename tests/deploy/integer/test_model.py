from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ptq4sam.deploy.integer import integer_model
from ptq4sam.deploy.integer.layers import IntegerConv2d, IntegerLinear
from ptq4sam.deploy.torch_int8 import with_integer_products
from ptq4sam.errors import CalibrationError, DeployError
from ptq4sam.model.insertion import QuantizedSam, insert_quantizers
from ptq4sam.model.layers import quantized_layers
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam

Forward = Callable[[Sam], tuple[Tensor, ...]]
Quantize = Callable[..., QuantizedSam]


def test_same_modules_with_integers_in_the_place_of_quantized_layers(quantize: Quantize) -> None:
    quantized = quantize(6)
    integer = integer_model(quantized)
    assert type(integer) is Sam
    for name, layer in quantized_layers(quantized):
        kind = IntegerLinear if isinstance(layer, torch.nn.Linear) else IntegerConv2d
        assert type(integer.get_submodule(name)) is kind
    assert not quantized_layers(integer)
    kept = {"image_encoder.pos_embed", "mask_decoder.iou_token.weight"}
    assert kept <= set(dict(integer.named_parameters()))


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("agq", [True, False])
@pytest.mark.parametrize("convert", [integer_model, with_integer_products])
def test_gives_the_bits_of_the_simulation(
    quantize: Quantize,
    forward: Forward,
    bits: int,
    agq: bool,
    convert: Callable[[QuantizedSam], Sam],
) -> None:
    quantized = quantize(bits, ptq4sam={"BIG": True, "AGQ": agq})
    assert all(map(torch.equal, forward(convert(quantized)), forward(quantized)))


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
    assert type(integer.image_encoder.blocks[0].attn.qkv) is torch.nn.Linear
    decoder = integer.mask_decoder.transformer
    assert type(decoder.layers[0].self_attn.q_proj) is IntegerLinear  # type: ignore[union-attr]


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


def test_grouped_convolutions_are_refused_by_name(quantize: Quantize) -> None:
    quantized = quantize()
    quantized.image_encoder.neck[2].groups = 2
    with pytest.raises(DeployError, match=r"neck\.2 has 2 groups"):
        integer_model(quantized)
