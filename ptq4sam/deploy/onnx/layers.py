"""Linear layers, convolutions, normalisations and activations, as ONNX nodes."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq4sam.deploy.onnx.graph import Graph
from ptq4sam.deploy.onnx.lowering import operator
from ptq4sam.deploy.onnx.traced import Product, Traced
from ptq4sam.deploy.onnx.values import (
    Value,
    array,
    check_bits,
    codes_of,
    dequantize,
    quantized_steps,
    steps_of,
)
from ptq4sam.deploy.onnx.weights import dequantized_weight, held_weight, pieces_of_input
from ptq4sam.errors import DeployError
from ptq4sam.operators.activation import PortableChannelGELU, PortableGELU
from ptq4sam.operators.base import QuantizedLayer, is_portable, step_of_sums
from ptq4sam.operators.convolution import (
    PortableConv2d,
    QuantizedConv2d,
    QuantizedConvTranspose2d,
    digit_weights,
    pixel_digits,
    weight_digits,
)
from ptq4sam.operators.linear import QuantizedLinear
from ptq4sam.operators.norm import LayerNorm2d, PortableLayerNorm, PortableLayerNorm2d
from ptq4sam.quantization.base import Quantizer
from ptq4sam.quantization.portable import apart, gelu, gelu_tanh, of_digits, rounded_sum
from ptq4sam.quantization.portable import layer_norm as layer_norm_of

Convolution = nn.Conv2d | nn.ConvTranspose2d | QuantizedConv2d | PortableConv2d
Linear = nn.Linear | QuantizedLinear


def _quantized_input(layer: nn.Module, x: Traced, path: str) -> Value:
    """The input of a layer as it takes it."""
    quantizer: Quantizer | None = getattr(layer, "input_quantizer", None)
    value, codes = codes_of(x, quantizer, f"{path}.input")
    return value.renamed(codes.name)


@operator(nn.Linear, QuantizedLinear)
def linear(graph: Graph, layer: Linear, x: Traced) -> Traced:
    """A linear layer, of which only those outputs are computed that somebody takes."""
    path, taken = graph.path, 0
    value = _quantized_input(layer, x, path)

    def make(outputs: Tensor | None) -> str:
        nonlocal taken
        name = path if outputs is None else f"{path}.{taken}"
        taken += 1
        made = _product(graph, layer, value, name, outputs)
        if x.ndim >= 3 or layer.bias is None or value.affine is None:
            return made
        # Its bias has three axes.
        return graph.node("Squeeze", [made, graph.integers(*range(3 - x.ndim))], f"{name}.squeezed")

    shape = (*x.shape[:-1], layer.weight.shape[0])
    exact = x.exact and graph.portable and value.affine is not None
    return Traced(graph, Product(make), shape, exact=exact)


def _product(graph: Graph, layer: Linear, x: Value, path: str, outputs: Tensor | None) -> str:
    if graph.multiplies_steps and x.affine is not None:
        product = _product_of_steps(graph, cast(QuantizedLinear, layer), x, path, outputs)
    else:
        factors = [dequantize(graph, x, f"{path}.input"), _matrix(graph, layer, x, path, outputs)]
        name = path if layer.bias is None else f"{path}.product"
        product = graph.node("MatMul", factors, name)
    if layer.bias is None:
        # Apart, as the product with the values of an attention is.
        whole = graph.portable and x.affine is not None
        return apart(Traced(graph, product, ())).name if whole else product
    bias = array(layer.bias if outputs is None else layer.bias.cpu()[outputs])
    if x.affine is not None:
        # With a bias of one dimension ONNX Runtime would make a float Gemm of the integer product.
        bias = bias[None, None]
    return graph.node("Add", [product, graph.constant(f"{path}.bias", bias)], path)


def _product_of_steps(
    graph: Graph, layer: QuantizedLayer, x: Value, path: str, outputs: Tensor | None = None
) -> str:
    """What sums of steps are worth, rounded before a bias is added.

    The sums are those of pieces where float32 does not hold all: it depends on the processor
    whether OpenVINO multiplies integers, and integers with zero points it never does.
    """
    # Of wider weights a single product may be more than float32 holds.
    check_bits(layer.weight_quantizer.grid, f"{path}.weight")
    pieces, axis, kind, geometry = pieces_of_input(layer), -1, "MatMul", {}
    step = array(step_of_sums(layer))
    step = step[outputs] if step.ndim and outputs is not None else step
    if layer.weight.dim() > 2:
        axis, kind, geometry, step = 1, "Conv", _geometry(layer), step.reshape(-1, 1, 1)
        groups = _windows(layer).groups
        if groups > 1 and len(pieces) > 1:
            raise DeployError(
                f"{path} has {groups} groups of {layer.weight.shape[1]} channels, whose sums "
                "float32 may round: it cannot be exported for OpenVINO"
            )
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
        sums.append(Traced(graph, product, ()))
    worth = graph.constant(f"{path}.worth", step)
    # Apart, or OpenVINO multiplies float32 weights with what the sums are worth.
    return apart(apart(rounded_sum(sums)).node("Mul", worth)).name


def _matrix(graph: Graph, layer: Linear, x: Value, path: str, outputs: Tensor | None) -> str:
    """The weight as [in, out]; an input in codes is that of a quantized layer."""
    if x.affine is not None:
        return dequantized_weight(graph, cast(QuantizedLinear, layer), path, outputs)
    weight = layer.weight if outputs is None else layer.weight.cpu()[outputs]
    return graph.parameter(f"{path}.weight", array(weight.t()))


@operator(nn.Conv2d, nn.ConvTranspose2d, QuantizedConv2d)
def convolution(graph: Graph, layer: Convolution, x: Traced) -> Traced:
    """A convolution or transposed convolution of [batch, channels, h, w], with groups or not."""
    path = graph.path
    shape = _shape_behind(layer, x, path)
    value = _quantized_input(layer, x, path)
    if value.affine is not None:
        name = _quantized_convolution(graph, cast(QuantizedConv2d, layer), value, path)
        return Traced(graph, name, shape, exact=x.exact and graph.portable)
    kind = "ConvTranspose" if isinstance(layer, nn.ConvTranspose2d) else "Conv"
    weight = graph.parameter(f"{path}.weight", array(layer.weight))
    name = _float_product(graph, layer, kind, [value.name, weight], path)
    return Traced(graph, name, shape, exact=False)


def _quantized_convolution(graph: Graph, layer: QuantizedConv2d, x: Value, path: str) -> str:
    if graph.dialect.convolutions == "integer":
        return _integer_convolution(graph, layer, x, path)
    if graph.multiplies_steps:
        return _with_bias(graph, layer, _product_of_steps(graph, layer, x, path), path)
    weight = dequantized_weight(graph, layer, path)
    factors = [dequantize(graph, x, f"{path}.input"), weight]
    return _float_product(graph, layer, "Conv", factors, path)


def _float_product(
    graph: Graph, layer: Convolution, kind: str, factors: list[str], path: str
) -> str:
    """A convolution of float factors, with its bias."""
    if layer.bias is not None:
        factors = [*factors, graph.constant(f"{path}.bias", array(layer.bias))]
    return graph.node(kind, factors, path, **_geometry(layer))


@operator(QuantizedConvTranspose2d)
def transposed_convolution(graph: Graph, layer: QuantizedConvTranspose2d, x: Traced) -> Traced:
    """The convolution of 1 x 1 that it is, and its outputs in squares."""
    path, side = graph.path, layer.side
    found = convolution(graph, layer, x)
    laid_out = graph.node(
        "DepthToSpace", [found.name], f"{path}.squares", blocksize=side, mode="CRD"
    )
    batch, channels, rows, columns = found.shape
    shape = (batch, channels // side**2, rows * side, columns * side)
    return Traced(graph, laid_out, shape, exact=found.exact)


def _windows(layer: nn.Module) -> Any:
    """Owner of stride, padding, dilation and groups: a float convolution itself."""
    return getattr(layer, "windows", layer)


def _shape_behind(layer: Convolution, x: Traced, path: str) -> torch.Size:
    """The result's shape.

    Raises:
        DeployError: the convolution pads otherwise than by zeros on both sides.
    """
    windows = _windows(layer)
    plain = getattr(layer, "padding_mode", "zeros") == "zeros" and not isinstance(
        windows.padding, str
    )
    if not plain or any(getattr(layer, "output_padding", ())):
        raise DeployError(
            f"{path} is a convolution whose padding is not one of zeros, alike on both sides: it "
            "cannot be exported"
        )
    given, weight = (torch.empty(t.shape, device="meta") for t in (x, layer.weight))
    convolve: Any = F.conv_transpose2d if isinstance(layer, nn.ConvTranspose2d) else F.conv2d
    geometry = {key: getattr(windows, key) for key in ("stride", "padding", "dilation", "groups")}
    found: torch.Size = convolve(given, weight, **geometry).shape
    return found


def _geometry(layer: nn.Module) -> dict[str, object]:
    windows = _windows(layer)
    padding = [int(size) for size in windows.padding]
    return {
        "kernel_shape": list(cast(Any, layer).weight.shape[2:]),
        "strides": list(windows.stride),
        "dilations": list(windows.dilation),
        "pads": [*padding, *padding],
        "group": windows.groups,
    }


def _with_bias(graph: Graph, layer: Convolution, x: str, path: str) -> str:
    if layer.bias is None:
        return x
    bias = graph.constant(f"{path}.bias", array(layer.bias).reshape(-1, 1, 1))
    return graph.node("Add", [x, bias], path)


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
        groups, outputs = _windows(layer).groups, layer.weight.shape[0]
        ones = graph.constant(f"{path}.ones", np.ones((groups, *layer.weight.shape[1:]), np.int8))
        inputs = graph.node("ConvInteger", [x.name, ones, zero], f"{path}.inputs", **geometry)
        if 1 < groups < outputs:
            places = graph.constant(f"{path}.groups", np.arange(groups).repeat(outputs // groups))
            inputs = graph.node("Gather", [inputs, places], f"{path}.inputs.by_output", axis=1)
        zeros = held.zero_point.to(torch.int32).reshape(-1, 1, 1).cpu().numpy()
        shares = graph.node(
            "Mul", [inputs, graph.constant(f"{path}.weight.zeros", zeros)], f"{path}.shares"
        )
        sums = graph.node("Sub", [sums, shares], f"{path}.sums")
    worth = graph.constant(f"{path}.worth", array(step_of_sums(layer)).reshape(-1, 1, 1))
    sums = graph.cast(sums, np.float32, f"{path}.sums.float32")
    return _with_bias(graph, layer, graph.node("Mul", [sums, worth], f"{path}.scaled"), path)


@operator(nn.LayerNorm, PortableLayerNorm)
def layer_norm(graph: Graph, layer: nn.LayerNorm, x: Traced) -> Traced:
    """Layer normalisation over the last axis."""
    return _normalized(graph, layer, x)


@operator(LayerNorm2d, PortableLayerNorm2d)
def layer_norm_2d(graph: Graph, layer: LayerNorm2d, x: Traced) -> Traced:
    """Layer normalisation over the channels of [batch, channels, h, w]."""
    normalized = _normalized(graph, layer, x.permute(0, 2, 3, 1))
    return cast(Traced, normalized.permute(0, 3, 1, 2))


def _normalized(graph: Graph, layer: nn.LayerNorm | LayerNorm2d, x: Traced) -> Traced:
    parameters = [
        graph.constant(f"{graph.path}.{name}", array(value))
        for name, value in (("weight", layer.weight), ("bias", layer.bias))
    ]
    if not (graph.portable and is_portable(layer)):
        how: Any = {"axis": -1, "epsilon": layer.eps}
        return x.node("LayerNormalization", *parameters, exact=False, **how)
    weight, bias = (x.new(name, layer.weight.shape) for name in parameters)
    return layer_norm_of(x, len(layer.weight), weight, bias, layer.eps).portable(x)


@operator(PortableConv2d)
def patches(graph: Graph, layer: PortableConv2d, x: Traced) -> Traced:
    """A convolution of pixels: [batch, channels, rows, columns]."""
    if not graph.portable:
        return convolution(graph, layer, x)
    path, shape = graph.path, _shape_behind(layer, x, graph.path)
    if layer.windows.groups > 1:
        raise DeployError(f"{path} has groups, of pixels: it cannot be exported")
    pixels = pixel_digits(x)
    weights, worth = weight_digits(layer.weight)
    sums = []
    one = graph.constant(f"{path}.one", np.array(1, np.float32))
    for count, weight in enumerate(digit_weights(weights), 1):
        inner = f"{path}.{count}"
        names = [digit.name for digit in pixels[:count]]
        given = graph.node("Concat", names, f"{inner}.pixels", axis=1)
        if graph.multiplies_steps:
            given = quantized_steps(Traced(graph, given, ())).name
        held = [graph.constant(f"{inner}.weight", array(weight).astype(np.int8)), one]
        factor = graph.node("DequantizeLinear", held, f"{inner}.weight.steps")
        product = graph.node("Conv", [given, factor], f"{inner}.sums", **_geometry(layer))
        sums.append(Traced(graph, product, shape))
    found = of_digits(*sums) * worth
    if layer.bias is not None:
        found = found + layer.bias[:, None, None]
    return found.portable(x)


@operator(PortableGELU)
def portable_gelu(graph: Graph, module: PortableGELU, x: Traced) -> Traced:
    """GELU by operations that all runtimes round alike."""
    if graph.portable:
        return (gelu if module.approximate == "none" else gelu_tanh)(x).portable(x)
    return cast(Traced, F.gelu(cast(Tensor, x), approximate=module.approximate))


@operator(PortableChannelGELU)
def portable_channel_gelu(graph: Graph, module: PortableChannelGELU, x: Traced) -> Traced:
    """GELU, and factors that are powers of two, which no runtime rounds."""
    activated = portable_gelu(graph, module, x)
    if bool((module.factors == 1).all()):
        return activated
    scaled = apart(activated) * module.factors
    return scaled.portable(activated)
