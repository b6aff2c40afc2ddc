"""The layers that SAM is made of, as ONNX nodes."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ptq4sam.deploy.onnx.graph import Graph
from ptq4sam.deploy.onnx.traced import Traced
from ptq4sam.deploy.onnx.values import (
    Value,
    dequantize,
    dequantized_weight,
    held_weight,
    pieces_of_input,
    quantize,
    quantized_steps,
    steps_of,
)
from ptq4sam.errors import DeployError
from ptq4sam.operators.activation import PortableGELU
from ptq4sam.operators.base import QuantizedLayer, step_of_sums
from ptq4sam.operators.convolution import (
    PortableConv2d,
    QuantizedConv2d,
    digit_weights,
    pixel_digits,
    weight_digits,
)
from ptq4sam.operators.linear import QuantizedLinear
from ptq4sam.operators.norm import LayerNorm2d, PortableLayerNorm, PortableLayerNorm2d
from ptq4sam.quantization.base import Quantizer
from ptq4sam.quantization.portable import apart, gelu, of_digits, rounded_sum
from ptq4sam.quantization.portable import layer_norm as layer_norm_of
from ptq4sam.sam.common import MLPBlock
from ptq4sam.sam.mask_decoder import MLP

_ACTIVATIONS = {nn.GELU: "Gelu", PortableGELU: "Gelu", nn.ReLU: "Relu"}


def array(tensor: Tensor) -> NDArray[np.float32]:
    """A parameter as a float32 array."""
    result: NDArray[np.float32] = tensor.detach().cpu().float().numpy()
    return result


def input_quantizer(layer: nn.Module) -> Quantizer | None:
    """The quantizer of a layer's input; None for a float layer."""
    return layer.input_quantizer if isinstance(layer, QuantizedLinear | QuantizedConv2d) else None


def linear(graph: Graph, layer: nn.Linear | QuantizedLinear, x: str, path: str) -> str:
    """A linear layer, float or quantized, of a float tensor."""
    return apply_linear(graph, layer, quantize_input(graph, layer, x, path), path)


def quantize_input(graph: Graph, layer: nn.Module, x: str, path: str) -> Value:
    """The input of a layer as it takes it."""
    return quantize(graph, x, input_quantizer(layer), f"{path}.input")


def apply_linear(
    graph: Graph,
    layer: nn.Linear | QuantizedLinear,
    x: Value,
    path: str,
    outputs: slice = slice(None),
) -> str:
    """A linear layer, or some of its outputs, of an input that is quantized where the layer is."""
    if graph.multiplies_steps and x.affine is not None:
        product = _product_of_steps(graph, cast(QuantizedLinear, layer), x, path, outputs)
    else:
        factors = [dequantize(graph, x, f"{path}.input"), _matrix(graph, layer, path, outputs)]
        name = path if layer.bias is None else f"{path}.product"
        product = graph.node("MatMul", factors, name)
    if layer.bias is None:
        return product
    bias = array(layer.bias)[outputs]
    if x.affine is not None:
        # With a bias of one dimension ONNX Runtime would make a float Gemm of the integer product.
        bias = bias[None, None]
    return graph.node("Add", [product, graph.constant(f"{path}.bias", bias)], path)


def _product_of_steps(
    graph: Graph,
    layer: QuantizedLayer,
    x: Value,
    path: str,
    outputs: slice = slice(None),
) -> str:
    """What sums of steps are worth, rounded before a bias is added.

    The sums are those of pieces where float32 does not hold all: it depends on the processor
    whether OpenVINO multiplies integers, and integers with zero points it never does.
    """
    pieces, axis, kind, geometry = pieces_of_input(layer), -1, "MatMul", {}
    step = array(step_of_sums(layer))
    step = step[outputs] if step.ndim else step
    if isinstance(layer, QuantizedConv2d):
        axis, kind, geometry, step = 1, "Conv", _geometry(layer), step.reshape(-1, 1, 1)
    names = [x.name]
    if len(pieces) > 1:
        names = graph.split(x.name, len(pieces), axis, f"{path}.input.pieces")
    sums = []
    for name, inputs in zip(names, pieces, strict=True):
        factors = [
            steps_of(graph, x.renamed(name), f"{path}.input"),
            dequantized_weight(graph, layer, path, outputs, inputs),
        ]
        product = graph.node(kind, factors, f"{path}.product", **geometry)
        sums.append(Traced(graph, product, f"{path}.sums"))
    worth = graph.constant(f"{path}.worth", step)
    # Apart, or OpenVINO multiplies float32 weights with what the sums are worth.
    return apart(apart(rounded_sum(sums)).node("Mul", worth)).name


def _matrix(graph: Graph, layer: nn.Linear | QuantizedLinear, path: str, outputs: slice) -> str:
    """The weight as [in, out]."""
    if type(layer) is nn.Linear:
        return graph.parameter(f"{path}.weight", array(layer.weight[outputs].t()))
    if not isinstance(layer, QuantizedLinear):
        raise _unknown(layer, path)
    return dequantized_weight(graph, layer, path, outputs)


def convolution(graph: Graph, layer: nn.Module, x: str, path: str) -> str:
    """A convolution or transposed convolution, float or quantized, of [batch, channels, h, w]."""
    if not isinstance(layer, QuantizedConv2d) and type(layer) not in (
        nn.Conv2d,
        nn.ConvTranspose2d,
        PortableConv2d,
    ):
        raise _unknown(layer, path)
    assert isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | QuantizedConv2d | PortableConv2d)
    if isinstance(layer, QuantizedConv2d | PortableConv2d):
        plain = layer.windows.groups == 1
    else:
        plain = (
            layer.groups == 1
            and layer.padding_mode == "zeros"
            and isinstance(layer.padding, tuple)
            and (not isinstance(layer, nn.ConvTranspose2d) or not any(layer.output_padding))
        )
    if not plain:
        raise DeployError(f"{path} is a convolution with groups or padding that SAM has not")
    value = quantize_input(graph, layer, x, path)
    if isinstance(layer, QuantizedConv2d) and not graph.signed:
        return _integer_convolution(graph, layer, value, path)
    if isinstance(layer, QuantizedConv2d) and graph.multiplies_steps:
        x = _product_of_steps(graph, layer, value, path)
        if layer.bias is None:
            return x
        bias = graph.constant(f"{path}.bias", array(layer.bias).reshape(-1, 1, 1))
        return graph.node("Add", [x, bias], path)
    kind = "ConvTranspose" if isinstance(layer, nn.ConvTranspose2d) else "Conv"
    if isinstance(layer, QuantizedConv2d):
        weight = dequantized_weight(graph, layer, path)
    else:
        weight = graph.parameter(f"{path}.weight", array(layer.weight))
    inputs = [dequantize(graph, value, f"{path}.input"), weight]
    if layer.bias is not None:
        inputs.append(graph.constant(f"{path}.bias", array(layer.bias)))
    return graph.node(kind, inputs, path, **_geometry(layer))


def _geometry(layer: Any) -> dict[str, list[int]]:
    windows = getattr(layer, "windows", layer)
    padding = [int(size) for size in windows.padding]
    return {
        "kernel_shape": list(layer.kernel_size),
        "strides": list(windows.stride),
        "dilations": list(windows.dilation),
        "pads": [*padding, *padding],
    }


def _integer_convolution(graph: Graph, layer: QuantizedConv2d, x: Value, path: str) -> str:
    """A quantized convolution by exact sums, as in the simulation.

    ONNX Runtime computes one of dequantized factors in float32. A zero point of the weights, which
    its integer one has not for each channel, is taken off by the sum of the inputs alone.
    """
    assert x.affine is not None
    held = held_weight(graph, layer, path)
    zero = graph.constant(f"{path}.input.zero_point", x.affine.zero_point)
    geometry = _geometry(layer)
    sums = graph.node("ConvInteger", [x.name, held.name, zero], f"{path}.sums.held", **geometry)
    if held.zero_point.any():
        ones = graph.constant(
            f"{path}.ones", np.ones((1, layer.in_channels, *layer.kernel_size), np.int8)
        )
        inputs = graph.node("ConvInteger", [x.name, ones, zero], f"{path}.inputs", **geometry)
        zeros = held.zero_point.to(torch.int32).reshape(-1, 1, 1).cpu().numpy()
        shares = graph.node(
            "Mul", [inputs, graph.constant(f"{path}.weight.zeros", zeros)], f"{path}.shares"
        )
        sums = graph.node("Sub", [sums, shares], f"{path}.sums")
    worth = graph.constant(f"{path}.worth", array(step_of_sums(layer)).reshape(-1, 1, 1))
    sums = graph.cast(sums, np.float32, f"{path}.sums.float32")
    if layer.bias is None:
        return graph.node("Mul", [sums, worth], path)
    bias = graph.constant(f"{path}.bias", array(layer.bias).reshape(-1, 1, 1))
    return graph.node("Add", [graph.node("Mul", [sums, worth], f"{path}.scaled"), bias], path)


def layer_norm(graph: Graph, layer: Any, x: str, path: str) -> str:
    """Layer normalisation over the last axis, or over the channels of [batch, channels, h, w]."""
    if not isinstance(layer, LayerNorm2d | PortableLayerNorm2d):
        return _normalized(graph, layer, x, path)
    x = graph.transpose(x, (0, 2, 3, 1), f"{path}.channels_last")
    return graph.transpose(_normalized(graph, layer, x, f"{path}.rows"), (0, 3, 1, 2), path)


def _normalized(graph: Graph, layer: Any, x: str, path: str) -> str:
    parameters = [
        graph.constant(f"{path}.{name}", array(value))
        for name, value in (("weight", layer.weight), ("bias", layer.bias))
    ]
    if not (graph.exact and isinstance(layer, PortableLayerNorm)):
        inputs = [x, *parameters]
        return graph.node("LayerNormalization", inputs, path, axis=-1, epsilon=layer.eps)
    traced, weight, bias = (Traced(graph, name, path) for name in (x, *parameters))
    return layer_norm_of(traced, len(layer.weight), weight, bias, layer.eps).name


def patches(graph: Graph, layer: nn.Conv2d, x: str, side: int, path: str) -> str:
    """The patch embedding of [1, channels, side, side] as [1, rows, columns, out_channels]."""
    if graph.exact and isinstance(layer, PortableConv2d):
        embedded = _patches_of_digits(graph, layer, x, path)
    else:
        embedded = convolution(graph, layer, x, path)
    return graph.transpose(embedded, (0, 2, 3, 1), f"{path}.last")


def _patches_of_digits(graph: Graph, layer: PortableConv2d, x: str, path: str) -> str:
    pixels = pixel_digits(Traced(graph, x, f"{path}.pixels"))
    weights, worth = weight_digits(layer.weight)
    sums = []
    one = graph.constant(f"{path}.one", np.array(1, np.float32))
    for count, weight in enumerate(digit_weights(weights), 1):
        inner = f"{path}.{count}"
        names = [digit.name for digit in pixels[:count]]
        given = graph.node("Concat", names, f"{inner}.pixels", axis=1)
        if graph.signed:
            given = quantized_steps(Traced(graph, given, inner)).name
        held = [graph.constant(f"{inner}.weight", array(weight).astype(np.int8)), one]
        factor = graph.node("DequantizeLinear", held, f"{inner}.weight.steps")
        product = graph.node("Conv", [given, factor], f"{inner}.sums", **_geometry(layer))
        sums.append(Traced(graph, product, path))
    patches = of_digits(*sums) * worth
    if layer.bias is not None:
        bias = graph.constant(f"{path}.bias", array(layer.bias).reshape(-1, 1, 1))
        patches = patches.node("Add", bias)
    return patches.name


def activation(graph: Graph, module: nn.Module, x: str, path: str) -> str:
    """GELU (exact) or ReLU."""
    if graph.exact and isinstance(module, PortableGELU):
        return gelu(Traced(graph, x, path)).name
    kind = _ACTIVATIONS.get(type(module))
    if kind is None or getattr(module, "approximate", "none") != "none":
        raise _unknown(module, path)
    return graph.node(kind, [x], path)


def mlp_block(graph: Graph, block: MLPBlock, x: str, path: str) -> str:
    """Two linear layers with an activation between them."""
    hidden = linear(graph, block.lin1, x, f"{path}.lin1")
    hidden = activation(graph, block.act, hidden, f"{path}.act")
    return linear(graph, block.lin2, hidden, f"{path}.lin2")


def perceptron(graph: Graph, module: MLP, x: str, path: str) -> str:
    """The decoder's linear layers with ReLU between them."""
    last = len(module.layers) - 1
    for index, layer in enumerate(module.layers):
        assert isinstance(layer, nn.Linear)
        x = linear(graph, layer, x, f"{path}.layers.{index}")
        if index < last:
            x = graph.node("Relu", [x], f"{path}.relu.{index}")
    return x


def sequential(graph: Graph, modules: nn.Sequential, x: str, path: str) -> str:
    """Convolutions, normalisations and activations one after the other."""
    for index, module in enumerate(modules):
        inner = f"{path}.{index}"
        if isinstance(module, LayerNorm2d | PortableLayerNorm2d):
            x = layer_norm(graph, module, x, inner)
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d | QuantizedConv2d):
            x = convolution(graph, module, x, inner)
        else:
            x = activation(graph, module, x, inner)
    return x


def _unknown(module: nn.Module, path: str) -> DeployError:
    return DeployError(
        f"{path} is a {type(module).__name__}, for which no exact form is known: it cannot be "
        "exported"
    )
