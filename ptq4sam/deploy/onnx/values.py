"""Tensors of a graph, float or as integer codes, and the way from one to the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptq4sam.deploy.codes import UniformGrid, uniform_grid
from ptq4sam.deploy.onnx.graph import Graph
from ptq4sam.deploy.onnx.traced import ZERO, Traced
from ptq4sam.errors import DeployError
from ptq4sam.methods.grouped import GroupedGrid
from ptq4sam.methods.hybrid_grid import BYTE, HybridGrid, hybrid_steps
from ptq4sam.methods.lnq import TableGrid
from ptq4sam.operators.attention_products import by_head
from ptq4sam.quantization.base import Mode, Quantizer
from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.grids import PointGrid
from ptq4sam.quantization.portable import quotient

CONTAINER_BITS = 8
UNSIGNED = 128
"""The code of 0 where signed codes are held unsigned."""


@dataclass(frozen=True)
class Affine:
    """What integer codes mean: (code - zero_point) * scale.

    Attributes:
        scale: [], [channels] or [heads], float32.
        zero_point: of the codes' type, [], [channels], or int32 [heads].
    """

    scale: NDArray[np.float32]
    zero_point: NDArray[Any]


@dataclass(frozen=True)
class Value:
    """A tensor of the graph: float where `affine` is None, else codes.

    Attributes:
        name: of the tensor.
        affine: what its codes mean.
    """

    name: str
    affine: Affine | None = None

    def part(self, name: str, heads: slice) -> Value:
        """Some heads of the same, at other places."""
        if self.affine is None or self.affine.zero_point.dtype != np.int32:
            return self.renamed(name)
        return Value(name, replace(self.affine, zero_point=self.affine.zero_point[heads]))

    def renamed(self, name: str) -> Value:
        """The same numbers at other places (reshaped, transposed, sliced)."""
        return replace(self, name=name)


Lowering = Callable[[Graph, str, Any, str], Value]
"""From graph, float tensor, grid and path to codes."""
LOWERINGS: dict[type[PointGrid], Lowering] = {}
"""How tensors are moved to grids that are not even, by the grid's type."""


def dequantize(graph: Graph, value: Value, path: str, factor: float = 1.0) -> str:
    """The float tensor of a value, times a factor."""
    if value.affine is None:
        return value.name
    scale = np.asarray(value.affine.scale * np.float32(factor), np.float32)
    return _dequantized(graph, value.name, value.affine, scale, path)


def steps_of(graph: Graph, value: Value, path: str) -> str:
    """The whole numbers that codes are less their zero point, as a float tensor."""
    assert value.affine is not None
    affine, one = value.affine, np.array(1, np.float32)
    if affine.zero_point.dtype != np.int32:
        return _dequantized(graph, value.name, affine, one, path)
    # No kernel takes zero points of heads.
    codes = graph.cast(value.name, np.float32, f"{path}.numbers")
    zeros = by_head(torch.from_numpy(affine.zero_point))
    return (Traced(graph, codes, ()) - zeros).name


def quantized_steps(steps: Traced) -> Traced:
    """Whole numbers of int8, behind a quantization that OpenVINO makes integer products of."""
    graph, path = steps.graph, f"{steps.graph.path}.steps"
    one = graph.number(1.0)
    zero = graph.constant(f"{path}.zero", np.array(0, np.int8))
    codes = graph.node("QuantizeLinear", [steps.name, one, zero], f"{path}.codes")
    return steps.new(graph.node("DequantizeLinear", [codes, one], path), steps.shape)


def _dequantized(
    graph: Graph, name: str, affine: Affine, scale: NDArray[np.float32], path: str
) -> str:
    inputs = [name, graph.constant(f"{path}.scale", scale)]
    if affine.zero_point.any():
        inputs.append(graph.constant(f"{path}.zero_point", affine.zero_point))
    return graph.node("DequantizeLinear", inputs, f"{path}.dequantized")


def codes_of(x: Traced, quantizer: Quantizer | None, path: str) -> tuple[Value, Traced]:
    """Codes of a float tensor on the quantizer's grid; None leaves it as it is.

    What is quantized is the tensor before its moves, which the codes make.

    Returns:
        The codes before the moves, and behind them; zeros around these are the codes of 0.
    """
    points = None if quantizer is None else quantizer.grid_in_use()
    by_channel = points is not None and (points.channels_last or points.step.dim() > 0)
    # These, or heads, are on their axis behind all moves.
    name, shape, moves = (x.name, tuple(x.shape), ()) if by_channel else x.unmoved
    value = quantize(x.graph, name, quantizer, path)
    if quantizer is not None:
        x.graph.quantized(path, x.exact and x.graph.portable)
    zero = ZERO if value.affine is None else value.affine.zero_point
    return value, Traced(x.graph, value.name, shape, moves, x.exact, zero)


def quantize(graph: Graph, x: str, quantizer: Quantizer | None, path: str) -> Value:
    """Codes of a float tensor on the quantizer's grid; None leaves it as it is.

    They have 8 bits also where the grid has fewer: the tensor is cut to its range first.

    Raises:
        DeployError: the quantizer's grid has no exact form.
    """
    if quantizer is None:
        return Value(x)
    require_quantizing(quantizer, path)
    points = quantizer.grid_in_use()
    if type(points) in LOWERINGS:
        return LOWERINGS[type(points)](graph, x, points, path)
    grid = uniform_grid(quantizer)
    affine = activation_format(grid, graph.dialect.codes == "signed", path)
    if graph.multiplies_steps or isinstance(grid.scale, Tensor):
        return _rounded_codes(graph, x, grid, affine, path)
    if grid.grid.bits < CONTAINER_BITS:
        bounds = [
            graph.number(float(np.float32(code - grid.zero_point) * np.float32(grid.scale)))
            for code in (grid.grid.qmin, grid.grid.qmax)
        ]
        x = graph.node("Clip", [x, *bounds], f"{path}.clipped")
    return Value(_quantize_linear(graph, x, affine, path), affine)


def hybrid_codes(graph: Graph, x: str, grid: HybridGrid, path: str) -> Value:
    """Points of a hybrid grid as bytes, of which the lowest is 0.

    Raises:
        DeployError: they do not fit into bytes.
    """
    if int(grid.from_lowest()[-1]) > BYTE:
        raise DeployError(
            f"{path} has a hybrid grid of {grid.codes.bits} bits, whose points are no bytes: "
            "quantize it to up to 6 bits"
        )
    numbers = grid.numbers.as_numbers()
    steps = hybrid_steps(Traced(graph, x, ()), numbers, grid.even, grid.logarithmic)
    one, zero = np.array(1, np.float32), np.array(0, np.uint8)
    codes = _quantize_linear(graph, steps.name, Affine(one, zero), path)
    return Value(codes, Affine(np.array(numbers.step, np.float32), np.array(grid.zero, np.uint8)))


def table_codes(graph: Graph, x: str, grid: TableGrid, path: str) -> Value:
    """Points of a table as bytes: how much higher each is than the one before, where reached."""
    ends, whole = grid.ends_of_codes.tolist(), grid.whole
    traced = Traced(graph, x, ())
    jumps = (whole[1:] - whole[:-1]).tolist()
    steps = traced.at_least(ends[0]) * jumps[0]
    for end, jump in zip(ends[1:], jumps[1:], strict=True):
        steps = steps + traced.at_least(end) * jump
    one, zero = np.array(1, np.float32), np.array(0, np.uint8)
    codes = _quantize_linear(graph, steps.name, Affine(one, zero), path)
    return Value(codes, Affine(np.array(float(grid.unit), np.float32), zero))


def grouped_codes(graph: Graph, x: str, grid: GroupedGrid, path: str) -> Value:
    """Points of a grouped grid as bytes, of which the lowest of all channels is 0."""
    lowest, ratio = -grid.zero, grid.ratio

    def by_channel(kind: str, given: str, values: Tensor, name: str) -> str:
        constant = graph.constant(f"{path}.{name}", array(values))
        return graph.node(kind, [given, constant], f"{path}.{name}.{kind}")

    # Powers of two: whatever a runtime makes of the products is exact.
    ratios = by_channel(
        "Mul", quotient(Traced(graph, x, ()), float(grid.scale)).name, 1 / ratio, "in"
    )
    codes = by_channel("Max", Traced(graph, ratios, ()).round().name, lowest, "lowest")
    codes = by_channel("Min", codes, lowest + grid.codes.qmax, "highest")
    below = int((lowest * ratio).min().clamp(max=0))
    steps = Traced(graph, by_channel("Mul", codes, ratio, "out"), ()) + float(-below)
    one, zero = np.array(1, np.float32), np.array(0, np.uint8)
    held = _quantize_linear(graph, steps.name, Affine(one, zero), path)
    return Value(held, Affine(np.array(float(grid.scale), np.float32), np.array(-below, np.uint8)))


LOWERINGS.update({HybridGrid: hybrid_codes, TableGrid: table_codes, GroupedGrid: grouped_codes})


def _quantize_linear(graph: Graph, x: str, affine: Affine, path: str) -> str:
    inputs = [
        x,
        graph.constant(f"{path}.scale", affine.scale),
        graph.constant(f"{path}.zero_point", affine.zero_point),
    ]
    return graph.node("QuantizeLinear", inputs, f"{path}.codes")


def _rounded_codes(graph: Graph, x: str, grid: UniformGrid, affine: Affine, path: str) -> Value:
    """Codes of a scale of 1: for OpenVINO, and where heads have scales.

    OpenVINO would multiply with the reciprocal of another scale, and of all numbers in the end. It
    takes these codes into its integer kernels like those of any scale, as ONNX Runtime does, whose
    kernels have no scales of heads.
    """
    scale, zero = grid.scale, grid.zero_point
    scale = by_head(scale) if isinstance(scale, Tensor) else scale
    given = Traced(graph, x, ())
    quotients: Traced = quotient(given, scale) if graph.multiplies_steps else given / scale
    steps = quotients.round()
    whole = replace(affine, scale=np.array(1, np.float32))
    if isinstance(zero, Tensor):
        steps, zero = steps + by_head(zero), 0
        whole = replace(whole, zero_point=np.array(0, np.uint8))
    low, high = (float(code - zero) for code in (grid.grid.qmin, grid.grid.qmax))
    return Value(_quantize_linear(graph, steps.clamp(low, high).name, whole, path), affine)


def activation_format(grid: UniformGrid, signed: bool, path: str) -> Affine:
    """What codes are in the graph: signed ones are distances from the zero point where these fit.

    Rounding x / scale and adding the zero point, as the simulation does, gives the same points.
    """
    check_bits(grid.grid, path)
    scale = np.asarray(grid.scale, np.float32)
    if isinstance(grid.zero_point, Tensor):
        return Affine(scale, np.asarray(grid.zero_point, np.int32))
    if signed and (grid.grid.symmetric or grid.grid.bits < CONTAINER_BITS):
        return Affine(scale, np.array(0, np.int8))
    shift = UNSIGNED if grid.grid.symmetric else 0
    return Affine(scale, np.array(grid.zero_point + shift, np.uint8))


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


def check_bits(grid: Grid, path: str) -> None:
    """Refuse codes of more bits than integer kernels take.

    Raises:
        DeployError: there are more.
    """
    if grid.bits > CONTAINER_BITS:
        raise DeployError(
            f"{path} has {grid.bits} bits, integer kernels take up to 8: quantize to fewer"
        )


def array(tensor: Tensor) -> NDArray[np.float32]:
    """A tensor as a float32 array."""
    result: NDArray[np.float32] = tensor.detach().cpu().float().numpy()
    return result
