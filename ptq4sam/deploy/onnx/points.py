"""Softmax outputs on the points of an adaptive granularity, as ONNX nodes.

Points are whole numbers. Where their sums over keys need more than float32 holds they are cut into
pieces whose sums it does hold.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ptq4sam.deploy.onnx.graph import Graph
from ptq4sam.methods.granularity_points import FLOOR
from ptq4sam.methods.granularity_table import LogarithmicGrid, point_table
from ptq4sam.quantization.base import Quantizer
from ptq4sam.quantization.whole import EXACT

_LARGEST = float(np.finfo(np.float32).max)


def point_codes(
    graph: Graph,
    x: str,
    quantizer: Quantizer,
    grid: LogarithmicGrid,
    path: str,
    parts: int,
) -> str:
    """Codes of softmax outputs, int32: by a logarithm, which may miss by one, and thresholds.

    Where the graph is not exact the thresholds are left out.

    Args:
        graph: where nodes go.
        x: softmax outputs.
        quantizer: of them.
        grid: its grid.
        path: of the quantizer.
        parts: see `looked_up`.
    """
    bounds = [graph.number(FLOOR), graph.number(_LARGEST)]
    floored = graph.node("Clip", [x, *bounds], f"{path}.floored")
    ratio = graph.node("Mul", [floored, graph.number(1 / float(grid.scale))], f"{path}.ratio")
    logarithm = graph.node("Log", [ratio], f"{path}.logarithm")
    step = graph.number(-grid.tau / math.log(2))
    steps = graph.node("Mul", [logarithm, step], f"{path}.steps")
    rounded = graph.node("Round", [steps], f"{path}.rounded")
    ends = [graph.number(0.0), graph.number(float(grid.codes.levels))]
    within = graph.node("Clip", [rounded, *ends], f"{path}.within")
    guess = graph.cast(within, np.int32, f"{path}.guess")
    if not graph.portable:
        return guess
    first = first_outputs(quantizer)
    # The last code has no first output, code 0 no last one.
    here = torch.cat([first, first.new_tensor([-1.0])])
    before = torch.cat([first.new_tensor([_LARGEST]), first])

    def beside(kind: str, table: Tensor, name: str) -> str:
        ends = looked_up(graph, guess, table, x, f"{path}.{name}.end", parts)
        found = graph.node(kind, [x, ends], f"{path}.is_{name}")
        return graph.cast(found, np.int32, f"{path}.{name}.by")

    later = graph.node("Add", [guess, beside("Less", here, "later")], f"{path}.or_later")
    earlier = beside("GreaterOrEqual", before, "earlier")
    return graph.node("Sub", [later, earlier], f"{path}.codes")


def first_outputs(quantizer: Quantizer) -> Tensor:
    """The smallest softmax output of each code, [levels]; outputs below the last one vanish."""
    levels = quantizer.grid.levels
    device = quantizer.scale.device
    codes = torch.arange(levels, device=device)
    # Bits of positive floats are in their order: halve until the first one is left.
    below = torch.zeros(levels, dtype=torch.int64, device=device)
    above = torch.full_like(below, int(np.float32(_LARGEST).view(np.int32)))
    while bool((above - below > 1).any()):
        middle = (below + above) // 2
        reached = quantizer.codes(middle.int().view(torch.float32)) <= codes
        below, above = torch.where(reached, below, middle), torch.where(reached, middle, above)
    return above.int().view(torch.float32)


def points_of(grid: LogarithmicGrid) -> Tensor:
    """Points of each code as whole numbers, int64 [levels + 1], the last one 0."""
    return point_table(grid.codes.levels, grid.tau, grid.fraction_bits)


def looked_up(graph: Graph, codes: str, table: Tensor, x: str, path: str, parts: int) -> str:
    """Entries [n] of a float32 table at codes of the shape of `x`.

    ONNX Runtime copies single numbers slowly in a Gather, and fast in a GatherElements, which it
    spreads over rows; OpenVINO has it the other way.

    Args:
        graph: where nodes go.
        codes: int32.
        table: the numbers.
        x: a tensor of the shape of `codes`.
        path: names the nodes.
        parts: a divisor of the number of codes, in so many parts of which a runtime may look up
            at the same time.
    """
    held = graph.constant(f"{path}.table", table.float().cpu().numpy())
    if graph.dialect.lookup == "Gather":
        return graph.node("Gather", [held, codes], path, axis=0)
    rows = graph.reshape(codes, (parts, -1), f"{path}.rows")
    tables = graph.node("Expand", [held, graph.integers(parts, 1)], f"{path}.tables")
    values = graph.node("GatherElements", [tables, rows], f"{path}.by_row", axis=1)
    shape = graph.node("Shape", [x], f"{path}.shape")
    # Without prompts there are no codes: a size of 0 is one, not that of the rows.
    return graph.node("Reshape", [values, shape], path, allowzero=1)


def cut_points(
    points: Tensor, largest: float, terms: int, value: float
) -> list[tuple[Tensor, float]]:
    """Pieces of points whose products with values have exact sums, and what 1 of each is worth.

    Args:
        points: whole numbers [n].
        largest: sum of points times values, at most.
        terms: keys, at most.
        value: the largest value.

    Returns:
        The piece of the largest bits first.
    """
    shift = max(0, math.ceil(math.log2(largest / EXACT)))
    pieces = [(points >> shift, 2.0**shift)]
    width = math.floor(math.log2(EXACT / (terms * value)))
    while shift > 0:
        low = max(0, shift - width)
        pieces.append(((points >> low) & ((1 << (shift - low)) - 1), 2.0**low))
        shift = low
    return pieces
