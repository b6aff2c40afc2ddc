"""Exact sums of products of activations in a graph, and what they are worth."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor

from ptq4sam.deploy.onnx.graph import Graph
from ptq4sam.deploy.onnx.points import cut_points, looked_up, point_codes, points_of
from ptq4sam.deploy.onnx.traced import Traced
from ptq4sam.deploy.onnx.values import quantized_steps, require_quantizing
from ptq4sam.methods.granularity_table import LogarithmicGrid
from ptq4sam.operators.attention_products import Whole
from ptq4sam.quantization.base import Quantizer
from ptq4sam.quantization.grids import PointGrid
from ptq4sam.quantization.portable import apart, rounded_sum
from ptq4sam.quantization.whole import EXACT

_DIGIT = 16.0
"""Base of digits of 8-bit steps: sums of 4096 products of 8 bits and a digit are exact."""


def sums_of_steps(left: Traced, right: Traced, largest: float, path: str) -> Traced:
    """Sums of products of two activations in steps, each at most `largest`.

    Where float32 would round them they are those of two digits of the right ones: OpenVINO may
    multiply integers or not.
    """
    graph, factors = left.graph, [right]
    if largest > EXACT:
        high = (factors[0] * (1 / _DIGIT)).round()
        factors = [quantized_steps(digit) for digit in (high, factors[0] - high * _DIGIT)]
    sums = [
        Traced(graph, graph.node("MatMul", [left.name, factor.name], f"{path}.sums"), ())
        for factor in factors
    ]
    return sums[0] if len(sums) == 1 else rounded_sum([sums[0] * _DIGIT, sums[1]])


def _sums_of_points(
    graph: Graph,
    quantizer: Quantizer,
    shares: str,
    value: str,
    cut: tuple[float, int, float],
    path: str,
    parts: int,
) -> Traced:
    """Sums over keys of whole points times values in steps; `cut` is what `cut_points` needs."""
    inner, grid = f"{path}.softmax_quantizer", cast(LogarithmicGrid, quantizer.grid_in_use())
    require_quantizing(quantizer, inner)
    codes = point_codes(graph, shares, quantizer, grid, inner, parts)
    points = points_of(grid)
    pieces = cut_points(points, *cut) if graph.portable and cut[0] > EXACT else [(points, 1.0)]
    sums = []
    for number, (table, unit) in enumerate(pieces):
        piece = looked_up(graph, codes, table, shares, f"{inner}.points.{number}", parts)
        product = graph.node("MatMul", [piece, value], f"{path}.sums.{number}")
        found = Traced(graph, product, ())
        sums.append(found if unit == 1.0 else found * unit)
    return rounded_sum(sums)


SUMS: dict[type[PointGrid], Callable[..., Traced]] = {LogarithmicGrid: _sums_of_points}
"""How products of softmax outputs and values are summed, by a grid whose points are no bytes.

Called as `_sums_of_points`.
"""


def worth_of_sums(sums: Traced, worth: Whole) -> str:
    """The name of what sums of steps are worth."""
    # Apart, or OpenVINO multiplies one of the operands with what the sums are worth.
    return apart(apart(sums) * factor(worth.step)).name


def factor(step: Tensor) -> Tensor | float:
    """What a traced tensor is multiplied with: one number, or a constant where heads have each."""
    return step if step.dim() else float(step)
