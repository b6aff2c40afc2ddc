"""Layers and attentions that multiply something else than their quantizers gave."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.operators.attention import QuantizedSoftmaxAttention
from ptq4sam.operators.convolution import QuantizedConv2d
from ptq4sam.operators.linear import QuantizedLinear

MLP = "image_encoder.blocks.0.mlp.lin1"
WINDOW = "image_encoder.blocks.0.attn"
GLOBAL = "image_encoder.blocks.1.attn.core"
FINAL = "mask_decoder.transformer.final_attn_token_to_image.core"
SELF = "mask_decoder.transformer.layers.0.self_attn"


def multiply_float_input(layer: QuantizedLinear, x: Tensor) -> Tensor:
    layer.input_quantizer(x)
    return F.linear(x, layer.weight_quantizer(layer.weight), layer.bias)


def multiply_float_steps(layer: QuantizedLinear, x: Tensor) -> Tensor:
    layer.input_quantizer(x, steps=True)
    weight = layer.weight_quantizer(layer.weight, steps=True)
    step = layer.input_quantizer.step * layer.weight_quantizer.step
    return (x / layer.input_quantizer.step) @ weight.t() * step + layer.bias


def multiply_by_einsum(layer: QuantizedLinear, x: Tensor) -> Tensor:
    layer.input_quantizer(x)
    return torch.einsum("...k,nk->...n", x, layer.weight_quantizer(layer.weight)) + layer.bias


@pytest.mark.parametrize(
    ("path", "forward_of"),
    [
        (MLP, multiply_float_input),
        (f"{WINDOW}.qkv", multiply_float_steps),
        (f"{SELF}.out_proj", multiply_by_einsum),
    ],
)
def test_a_layer_that_multiplies_its_float_input(
    quantized: QuantizedSam,
    told: Callable[[], list[str]],
    forward_of: Callable[[QuantizedLinear, Tensor], Tensor],
    path: str,
) -> None:
    layer = quantized.get_submodule(path)
    layer.forward = types.MethodType(forward_of, layer)
    (line,) = told()
    assert line.startswith(f"{path}: ")
    assert line.endswith(
        "% of the input values that it multiplied are off the grid, "
        "expected points of its input_quantizer"
    )


def test_a_layer_that_multiplies_its_float_weight(
    quantized: QuantizedSam, told: Callable[[], list[str]]
) -> None:
    def forward(layer: QuantizedLinear, x: Tensor) -> Tensor:
        layer.weight_quantizer(layer.weight)
        return F.linear(layer.input_quantizer(x), layer.weight + 1e-3, layer.bias)

    layer = quantized.get_submodule(MLP)
    layer.forward = types.MethodType(forward, layer)
    assert [line for line in told() if line.startswith(MLP) and "of the weight values" in line]


def test_a_convolution_that_multiplies_its_float_input(
    quantized: QuantizedSam, told: Callable[[], list[str]]
) -> None:
    def forward(layer: QuantizedConv2d, x: Tensor) -> Tensor:
        layer.input_quantizer(x)
        return F.conv2d(x, layer.weight_quantizer(layer.weight), padding=layer.windows.padding)

    layer = quantized.image_encoder.neck[2]
    layer.forward = types.MethodType(forward, layer)
    (line,) = told()
    assert line.startswith("image_encoder.neck.2: ")
    assert "of the input values" in line


def test_a_layer_that_makes_no_product_of_its_own(
    quantized: QuantizedSam, told: Callable[[], list[str]]
) -> None:
    def forward(layer: QuantizedLinear, x: Tensor) -> Tensor:
        x, weight = layer.input_quantizer(x), layer.weight_quantizer(layer.weight)
        return (x[..., None, :] * weight).sum(-1) + layer.bias

    layer = quantized.get_submodule(MLP)
    layer.forward = types.MethodType(forward, layer)
    assert told() == [f"{MLP}: made no product of its input and weight, expected one"]


@pytest.mark.parametrize("path", [GLOBAL, FINAL])
@pytest.mark.parametrize("role", ["query", "key", "value", "softmax"])
def test_an_attention_that_multiplies_floats(
    quantized: QuantizedSam, told: Callable[[], list[str]], path: str, role: str
) -> None:
    attention = quantized.get_submodule(path)
    product = "query_key" if role in ("query", "key") else "attention_value"
    module = getattr(attention, product)
    plain, position = module.forward, 0 if role in ("query", "softmax") else 1

    def forward(*operands: object) -> Tensor:
        given = list(operands)
        given[position] = cast(Tensor, given[position]) * 1.01
        result: Tensor = plain(*given)
        return result

    module.forward = forward
    assert [
        line for line in told() if line.startswith(f"{path}: ") and f"the {role} values" in line
    ]


def test_an_attention_in_one_piece(quantized: QuantizedSam, told: Callable[[], list[str]]) -> None:
    def attend(
        attention: QuantizedSoftmaxAttention, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        return F.scaled_dot_product_attention(
            attention.query_quantizer(query),
            attention.key_quantizer(key),
            attention.value_quantizer(value),
            scale=attention.scale,
        )

    attention = quantized.get_submodule(FINAL)
    attention.forward = types.MethodType(attend, attention)
    lines = told()
    assert f"{FINAL}: made no product of its query and key, expected one" in lines
    assert f"{FINAL}.softmax_quantizer: no activation passed it" in lines
    assert (
        f"{FINAL}: made 1 products that are not of its query and positions, expected none" in lines
    )


def test_a_float_product_beside_relative_positions(
    quantized: QuantizedSam, told: Callable[[], list[str]]
) -> None:
    attention = cast(QuantizedSoftmaxAttention, quantized.get_submodule(GLOBAL))
    plain = attention.forward

    def with_product(x: Tensor, *others: Any) -> Tensor:
        return plain(x, *others) + 0 * (x @ x.transpose(-1, -2)).sum()

    attention.forward = with_product  # type: ignore[method-assign]
    wanted = "made 1 products that are not of its query and positions, expected none"
    assert told() == [f"{GLOBAL}: {wanted}"]
