"""Tensors of a graph, float or as integer codes, and the way from one to the other."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptq4sam.deploy.codes import LogGrid, UniformGrid, layer_codes, softmax_grid
from ptq4sam.deploy.onnx.graph import Graph
from ptq4sam.errors import DeployError
from ptq4sam.methods.adaptive_granularity import AdaptiveGranularityQuantizer
from ptq4sam.methods.granularity_points import FLOOR
from ptq4sam.methods.granularity_table import point_table
from ptq4sam.model.layers import QuantizedLayer
from ptq4sam.quantization.base import Mode, Quantizer
from ptq4sam.quantization.grid import Grid, along_channels

_CONTAINER_BITS = 8
_NIBBLE_BITS = 4
_UNSIGNED = 128
"""The code of 0 where signed codes are held unsigned."""


@dataclass(frozen=True)
class Affine:
    """What integer codes mean: (code - zero_point) * scale.

    Attributes:
        scale: [] or [channels], float32.
        zero_point: of the codes' type, in the shape of `scale`.
    """

    scale: NDArray[np.float32]
    zero_point: NDArray[Any]


@dataclass(frozen=True)
class Value:
    """A tensor of the graph: float where `affine` is None, else codes.

    Attributes:
        name: of the tensor.
        affine: what its codes mean.
        step: what 1 is worth; not 1 for the whole points of an adaptive granularity.
    """

    name: str
    affine: Affine | None = None
    step: float = 1.0

    def in_steps(self) -> Value:
        """The same codes, each step of which is worth 1."""
        if self.affine is None:
            return self
        return replace(self, affine=replace(self.affine, scale=np.array(1, np.float32)))

    def renamed(self, name: str) -> Value:
        """The same numbers at other places (reshaped, transposed, sliced)."""
        return replace(self, name=name)


def dequantize(graph: Graph, value: Value, path: str, factor: float = 1.0) -> str:
    """The float tensor of a value, times a factor."""
    if value.affine is None:
        factor *= value.step
        if factor == 1.0:
            return value.name
        return graph.node("Mul", [value.name, graph.number(factor)], f"{path}.scaled")
    scale = np.asarray(value.affine.scale * np.float32(factor), np.float32)
    inputs = [value.name, graph.constant(f"{path}.scale", scale)]
    if value.affine.zero_point.any():
        inputs.append(graph.constant(f"{path}.zero_point", value.affine.zero_point))
    return graph.node("DequantizeLinear", inputs, f"{path}.dequantized")


def quantize(graph: Graph, x: str, quantizer: Quantizer | None, path: str, parts: int = 1) -> Value:
    """A float tensor on the quantizer's grid; None leaves it as it is.

    Evenly spaced grids give codes, in 8 bits also where they have fewer: the tensor is cut to their
    range first. Powers of 2 (adaptive granularity) give a float tensor of whole numbers of steps.

    Args:
        graph: where nodes go.
        x: the tensor.
        quantizer: of it.
        path: of the quantizer.
        parts: a divisor of the number of its elements, in so many parts of which a runtime may look
            up powers at the same time.

    Raises:
        DeployError: the quantizer's grid has no exact form.
    """
    if quantizer is None:
        return Value(x)
    require_quantizing(quantizer, path)
    grid = softmax_grid(quantizer)
    if isinstance(grid, LogGrid):
        quantizer = cast(AdaptiveGranularityQuantizer, quantizer)
        points = point_table(grid.grid.levels, grid.tau, quantizer.fraction_bits())
        return Value(_powers(graph, x, grid, points, path, parts), step=float(quantizer.step))
    affine = activation_format(grid, graph.signed, path)
    if grid.grid.bits < _CONTAINER_BITS:
        bounds = [
            graph.number(float(np.float32(code - grid.zero_point) * np.float32(grid.scale)))
            for code in (grid.grid.qmin, grid.grid.qmax)
        ]
        x = graph.node("Clip", [x, *bounds], f"{path}.clipped")
    inputs = [
        x,
        graph.constant(f"{path}.scale", affine.scale),
        graph.constant(f"{path}.zero_point", affine.zero_point),
    ]
    return Value(graph.node("QuantizeLinear", inputs, f"{path}.codes"), affine)


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


def held_weight(
    graph: Graph, layer: QuantizedLayer, path: str, outputs: slice = slice(None)
) -> HeldWeight:
    """The weight of a layer as integers; `outputs` are those of its channels that are wanted.

    Codes of up to 4 bits are held two in a byte, others in one each. What is multiplied are their
    distances from the zero point where these fit into int8, up to 7 bits and for symmetric grids:
    runtimes have faster integer products for codes without zero point.

    Raises:
        DeployError: the weight is not on a grid of at most 8 bits.
    """
    name = f"{path}.weight"
    require_quantizing(layer.weight_quantizer, name)
    weight = layer_codes(layer)
    _check_bits(weight.grid, name)
    codes, scale, zero_point = weight.codes[outputs], weight.scale, weight.zero_point
    if scale.dim():
        scale, zero_point = scale[outputs], zero_point[outputs]
    zeros = along_channels(zero_point, codes.dim(), 0)
    axis = 0
    if codes.dim() == 2:
        codes, axis = codes.t(), 1
        zeros = zeros.reshape(1, -1) if zeros.dim() else zeros
    if weight.grid.bits <= _NIBBLE_BITS:
        held = graph.nibbles(name, (codes - weight.grid.qmin).numpy())
        below = graph.constant(f"{name}.zero", (zeros - weight.grid.qmin).numpy())
        difference = graph.node("Sub", [held, below], f"{name}.distance")
        held = graph.cast(difference, np.int8, f"{name}.int8")
        return HeldWeight(held, scale, torch.zeros_like(zero_point), axis)
    distance, zero_point_held = codes - zeros, torch.zeros_like(zero_point)
    if int(distance.min()) < -128 or int(distance.max()) > 127:
        distance, zero_point_held = codes - _UNSIGNED, zero_point - _UNSIGNED
    return HeldWeight(graph.constant(name, _int8(distance)), scale, zero_point_held, axis)


def dequantized_weight(
    graph: Graph, layer: QuantizedLayer, path: str, outputs: slice = slice(None)
) -> str:
    """The float weight of a layer, from integers; see `held_weight`."""
    held, name = held_weight(graph, layer, path, outputs), f"{path}.weight"
    inputs = [held.name, graph.constant(f"{name}.scale", _float32(held.scale))]
    if held.zero_point.any():
        inputs.append(graph.constant(f"{name}.zero_point", _int8(held.zero_point)))
    return graph.node("DequantizeLinear", inputs, f"{name}.dequantized", axis=held.axis)


def activation_format(grid: UniformGrid, signed: bool, path: str) -> Affine:
    """What codes are in the graph: signed ones are distances from the zero point where these fit.

    Rounding x / scale and adding the zero point, as the simulation does, gives the same points.
    """
    _check_bits(grid.grid, path)
    scale = np.array(grid.scale, np.float32)
    if signed and (grid.grid.symmetric or grid.grid.bits < _CONTAINER_BITS):
        return Affine(scale, np.array(0, np.int8))
    shift = _UNSIGNED if grid.grid.symmetric else 0
    return Affine(scale, np.array(grid.zero_point + shift, np.uint8))


def _powers(graph: Graph, x: str, grid: LogGrid, points: Tensor, path: str, parts: int) -> str:
    """Softmax outputs moved to powers of 2^(1/tau): the code by a logarithm, the value by a table.

    The logarithm is one of float64 where the runtime has it. The table holds whole numbers (see
    `granularity_table`); its last entry, one beyond the grid, is the 0 of what is too small. ONNX
    Runtime copies single numbers slowly in a Gather, and fast in a GatherElements, which it spreads
    over rows.
    """
    levels = grid.grid.levels
    table = graph.constant(f"{path}.points", _float32(points))
    kind = np.float64 if graph.has_float64 else np.float32
    largest = float(np.finfo(np.float32).max)
    bounds = [graph.number(FLOOR), graph.number(largest)]
    floored = graph.node("Clip", [x, *bounds], f"{path}.floored")
    ratio = graph.node("Div", [floored, graph.number(grid.scale)], f"{path}.ratio")
    if graph.has_float64:
        ratio = graph.cast(ratio, kind, f"{path}.ratio.float64")
    logarithm = graph.node("Log", [ratio], f"{path}.logarithm")
    step = graph.number(-grid.tau / math.log(2), kind)
    steps = graph.node("Mul", [logarithm, step], f"{path}.steps")
    rounded = graph.node("Round", [steps], f"{path}.rounded")
    ends = [graph.number(0.0, kind), graph.number(float(levels), kind)]
    codes = graph.node("Clip", [rounded, *ends], f"{path}.within")
    indices = graph.cast(codes, np.int32, f"{path}.codes")
    if graph.signed:
        return graph.node("Gather", [table, indices], f"{path}.values", axis=0)
    rows = graph.reshape(indices, (parts, -1), f"{path}.rows")
    tables = graph.node("Expand", [table, graph.integers(parts, 1)], f"{path}.tables")
    values = graph.node("GatherElements", [tables, rows], f"{path}.looked_up", axis=1)
    shape = graph.node("Shape", [x], f"{path}.shape")
    return graph.node("Reshape", [values, shape], f"{path}.values")


def require_quantizing(quantizer: Quantizer, path: str) -> None:
    """Make sure that a quantizer quantizes all that passes it.

    Raises:
        DeployError: it does not.
    """
    if quantizer.mode is not Mode.QUANTIZE or quantizer.drop_probability > 0:
        raise DeployError(
            f"{path} is off or lets elements through at random: only a frozen model (compat: "
            "faithful) can be exported"
        )


def _check_bits(grid: Grid, path: str) -> None:
    if grid.bits > _CONTAINER_BITS:
        raise DeployError(
            f"{path} has {grid.bits} bits, integer kernels take up to 8: quantize to fewer"
        )


def _float32(x: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = x.detach().cpu().float().numpy()
    return array


def _int8(x: Tensor) -> NDArray[np.int8]:
    array: NDArray[np.int8] = x.detach().cpu().to(torch.int8).numpy()
    return array
