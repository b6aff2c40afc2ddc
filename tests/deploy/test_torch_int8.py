from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ptq4sam.deploy.torch_int8 import Int8Linear, with_integer_products
from ptq4sam.errors import DeployError
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.model.layers import QuantizedLinear, put_weights_on_grid
from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.modes import quantizer_mode
from ptq4sam.quantization.quantizers import FixedQuantizer, Mode
from ptq4sam.sam.model import Sam

Quantize = Callable[..., QuantizedSam]


def frozen_linear(weight: Grid, given: Grid, bias: bool = True) -> QuantizedLinear:
    torch.manual_seed(0)
    layer = QuantizedLinear(
        nn.Linear(48, 40, bias=bias), FixedQuantizer(weight, channel_axis=0), FixedQuantizer(given)
    ).requires_grad_(False)
    # Channels on one side of 0 have zero points at the ends of the grid.
    layer.weight[:5].abs_()
    layer.weight[5:10].abs_().neg_()
    with quantizer_mode(layer, Mode.OBSERVE):
        layer.weight_quantizer(layer.weight)
        layer.input_quantizer(torch.randn(1000) + 0.5)
    put_weights_on_grid(layer)
    return layer


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("symmetric_weight", [False, True])
@pytest.mark.parametrize("symmetric_input", [False, True])
def test_a_layer_on_integers_is_that_of_the_simulation(
    bits: int, symmetric_weight: bool, symmetric_input: bool
) -> None:
    layer = frozen_linear(Grid(bits, symmetric_weight), Grid(bits, symmetric_input))
    integer = Int8Linear(layer, "layer")
    assert integer.weight.dtype == torch.int8
    x = 2 * torch.randn(3, 20, 48)
    exact = layer.double()(x.double())
    torch.testing.assert_close(integer(x).double(), exact, rtol=1e-5, atol=1e-5)
    layer.float()  # the bias is shared
    with torch.no_grad():
        assert torch.equal(integer(x), layer(x))


def test_a_layer_without_bias() -> None:
    layer = frozen_linear(Grid(8), Grid(8), bias=False)
    x = torch.randn(20, 48)
    torch.testing.assert_close(Int8Linear(layer, "layer")(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_on_integers_is_that_of_the_simulation(
    bits: int, quantize: Quantize, forward: Callable[[Sam], tuple[torch.Tensor, ...]]
) -> None:
    model = quantize(bits)
    integer = with_integer_products(model)
    layers = [module for module in integer.modules() if isinstance(module, Int8Linear)]
    expected = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == len(expected) > 20
    assert not any(isinstance(module, QuantizedLinear) for module in integer.modules())
    assert all(map(torch.equal, forward(integer), forward(model)))


def test_more_than_8_bits_are_refused(quantize: Quantize) -> None:
    formats: dict[str, Any] = {"quantizer": "FixedFakeQuantize", "observer": "MinMaxObserver"}
    model = quantize(8, a_qconfig={**formats, "bit": 10})
    with pytest.raises(DeployError, match=r"image_encoder.blocks.0.attn.qkv has 10 bits"):
        with_integer_products(model)
