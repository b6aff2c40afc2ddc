"""Weights of a graph, as integers or as what these are worth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptq4sam.deploy.codes import layer_codes
from ptq4sam.deploy.onnx.graph import Graph
from ptq4sam.deploy.onnx.values import (
    CONTAINER_BITS,
    UNSIGNED,
    array,
    check_bits,
    require_quantizing,
)
from ptq4sam.operators.base import QuantizedLayer
from ptq4sam.quantization.grid import along_channels
from ptq4sam.quantization.groups import GROUPED
from ptq4sam.quantization.whole import exact_pieces

_NIBBLE_BITS = 4


@dataclass(frozen=True)
class HeldWeight:
    """A weight as integers: (code - zero_point) * scale.

    Attributes:
        name: of the int8 tensor, [in, out] of a linear layer, else as the layer's.
        scale: [] or [out].
        zero_point: in the shape of `scale`, int32; in the range of int8.
        axis: of the output channels.
    """

    name: str
    scale: Tensor
    zero_point: Tensor
    axis: int


_ALL = slice(None)


def held_weight(
    graph: Graph,
    layer: QuantizedLayer,
    path: str,
    outputs: Tensor | None = None,
    inputs: slice = _ALL,
) -> HeldWeight:
    """The weight of a layer as integers, for some of its output and input channels.

    Codes of up to 4 bits are held two in a byte, others in one each. What is multiplied are their
    distances from the zero point where these fit into int8, up to 7 bits and for symmetric grids:
    runtimes have faster integer products for codes without zero point.

    Raises:
        DeployError: the weight is not on a grid of at most 8 bits.
    """
    name = f"{path}.weight"
    require_quantizing(layer.weight_quantizer, name)
    weight = layer_codes(layer)
    check_bits(weight.grid, name)
    bits, codes, scale, zero_point = weight.grid.bits, weight.codes, weight.scale, weight.zero_point
    if scale.dim() == GROUPED:
        # Steps of all groups are bytes.
        bits, codes, scale = CONTAINER_BITS, weight.steps(), weight.step
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
    codes, scale, zero_point = codes[:, inputs].cpu(), scale.cpu(), zero_point.cpu()
    if outputs is not None:
        codes = codes[outputs]
        if scale.dim():
            scale, zero_point = scale[outputs], zero_point[outputs]
    zeros = along_channels(zero_point, codes.shape, 0)
    axis = 0
    if codes.dim() == 2:
        codes, axis = codes.t(), 1
        zeros = zeros.reshape(1, -1) if zeros.dim() else zeros
    if bits <= _NIBBLE_BITS:
        held = graph.nibbles(name, (codes - weight.grid.qmin).cpu().numpy())
        below = graph.constant(f"{name}.zero", (zeros - weight.grid.qmin).cpu().numpy())
        difference = graph.node("Sub", [held, below], f"{name}.distance")
        held = graph.cast(difference, np.int8, f"{name}.int8")
        return HeldWeight(held, scale, torch.zeros_like(zero_point), axis)
    distance, zero_point_held = codes - zeros, torch.zeros_like(zero_point)
    if int(distance.min()) < -128 or int(distance.max()) > 127:
        distance, zero_point_held = codes - UNSIGNED, zero_point - UNSIGNED
    return HeldWeight(graph.constant(name, _int8(distance)), scale, zero_point_held, axis)


def dequantized_weight(
    graph: Graph,
    layer: QuantizedLayer,
    path: str,
    outputs: Tensor | None = None,
    inputs: slice = _ALL,
) -> str:
    """The float weight of a layer, from integers; see `held_weight`; or its steps."""
    held, name = held_weight(graph, layer, path, outputs, inputs), f"{path}.weight"
    scale = torch.ones_like(held.scale) if graph.multiplies_steps else held.scale
    given = [held.name, graph.constant(f"{name}.scale", array(scale))]
    if held.zero_point.any():
        given.append(graph.constant(f"{name}.zero_point", _int8(held.zero_point)))
    return graph.node("DequantizeLinear", given, f"{name}.dequantized", axis=held.axis)


def pieces_of_input(layer: QuantizedLayer) -> list[slice]:
    """Input channels in pieces of which float32 holds all sums of steps; mostly one."""
    steps = layer_codes(layer).steps()
    sizes = steps.abs().flatten(2).sum(-1) if steps.dim() > 2 else steps
    channels, largest = sizes.shape[1], layer.input_quantizer.grid.largest_step
    each = -(-channels // exact_pieces(sizes.float(), largest, most=channels))
    return [slice(first, first + each) for first in range(0, channels, each)]


def _int8(x: Tensor) -> NDArray[np.int8]:
    array: NDArray[np.int8] = x.detach().cpu().to(torch.int8).numpy()
    return array
