"""An activation function and the quantizer behind it as one step function, as ONNX nodes.

Runtimes have GELUs of their own, whose last bits differ: values in the middle of two codes get the
other one. The inputs at which the code changes are found here with the simulation's own function;
the graph only compares with them. So its codes are those of the simulation, all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ptq4sam.deploy.codes import uniform_grid
from ptq4sam.deploy.onnx.graph import Graph
from ptq4sam.deploy.onnx.values import Value, activation_format, require_quantizing
from ptq4sam.model.rounding_once import RoundedGELU
from ptq4sam.quantization.base import Quantizer

_FLAT = -8.0
"""Below it GELU is 0, but for 1e-14."""
_TURNS = (-0.7517916,)
"""Where GELU is least."""
_MOST_CELLS = 2**16
_PIECES = 4
"""Into so many pieces a large tensor is cut."""
_PROBES = 16
"""Inputs in each cell at which a step function is compared with what it stands for."""

CodesOf = Callable[[Tensor], Tensor]
"""From float32 inputs to codes; it must be that of each element alone."""


@dataclass(frozen=True)
class Steps:
    """Codes as a function of float32 inputs that are cut into cells of one width.

    In cell i, from (first + i) * width on, the code is `before` for inputs below `threshold` and
    `after` from it on. Inputs outside belong to the outermost cells.

    Attributes:
        first: number of the first cell, at most 0.
        width: a power of 2.
        threshold: [cells], float32.
        before: [cells], int32.
        after: [cells], int32.
    """

    first: int
    width: float
    threshold: Tensor
    before: Tensor
    after: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Codes of `x`, int32."""
        last = self.first + len(self.threshold) - 1
        cell = (x / self.width).floor().clamp(self.first, last).long() - self.first
        return torch.where(x >= self.threshold[cell], self.after[cell], self.before[cell])


def find_steps(
    codes: CodesOf, low: float, high: float, apart: float, turns: Sequence[float] = ()
) -> Steps | None:
    """The step function that gives the same codes.

    Args:
        codes: constant below `low` and from `high` on, monotone between the `turns`.
        low: at most 0.
        high: above 0.
        apart: about how far two changes of the code are apart at least.
        turns: where it turns.

    Returns:
        None where two changes are so near each other that too many cells would be needed.
    """
    width = 2.0 ** np.floor(np.log2(apart))
    while (high - low) / width <= _MOST_CELLS:
        steps = _steps(codes, int(np.floor(low / width)) - 1, int(np.ceil(high / width)), width)
        if steps is not None and _agrees(steps, codes, turns):
            return steps
        width /= 2
    return None


def _steps(codes: CodesOf, first: int, last: int, width: float) -> Steps | None:
    """With cells `first` to `last`; None where a code changes by more than 1 within one."""
    edges = torch.arange(first, last + 2, dtype=torch.float64).mul(width).float()
    start = edges[:-1]
    end = torch.nextafter(edges[1:], torch.tensor(-torch.inf))
    before, after = codes(start).int(), codes(end).int()
    if int((after - before).abs().max()) > 1:
        return None
    # Halve the floats between start and end until the first one with the other code is left.
    below, above = _ordinal(start), _ordinal(end)
    while bool(((above - below) > 1).any()):
        middle = (below + above) // 2
        is_after = codes(_of_ordinal(middle)).int() == after
        below, above = torch.where(is_after, below, middle), torch.where(is_after, middle, above)
    return Steps(first, width, _of_ordinal(above), before, after)


def _ordinal(x: Tensor) -> Tensor:
    """Numbers of floats in their order, int64; those of both zeros are one."""
    bits = x.view(torch.int32).long()
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _of_ordinal(number: Tensor) -> Tensor:
    size = number.abs().int().view(torch.float32)
    return torch.where(number < 0, -size, size)


def _agrees(steps: Steps, codes: CodesOf, turns: Sequence[float]) -> bool:
    """Whether both give the same codes at inputs all over, next to the changes and at the turns."""
    cells = len(steps.threshold)
    inner = (torch.arange(cells * _PROBES) + 0.5) / _PROBES + steps.first
    places = [
        (inner * steps.width).float(),
        steps.threshold,
        torch.nextafter(steps.threshold, torch.tensor(-torch.inf)),
        torch.tensor(list(turns)),
    ]
    x = torch.cat(places)
    return torch.equal(steps(x), codes(x).int())


def quantized_gelu(
    graph: Graph, x: str, gelu: RoundedGELU, quantizer: Quantizer, path: str, parts: int
) -> Value | None:
    """GELU of a float tensor, quantized as in the simulation.

    Args:
        graph: where nodes go.
        x: the tensor.
        gelu: the simulation's.
        quantizer: of its output.
        path: names the nodes.
        parts: a divisor of the number of elements of `x`, see `values.quantize`.

    Returns:
        None where its steps are too fine for a table.

    Raises:
        DeployError: the quantizer's grid has no exact form.
    """
    require_quantizing(quantizer, path)
    grid = uniform_grid(quantizer)
    affine = activation_format(grid, graph.signed, path)
    shift = int(affine.zero_point) - grid.zero_point

    def codes(inputs: Tensor) -> Tensor:
        return quantizer.codes(gelu(inputs)) + shift

    # A step of its input is at most 1.13 of its output; above 0 it is the input less 0.17 at most.
    largest = (grid.grid.qmax - grid.zero_point + 1) * grid.scale
    with torch.no_grad():
        steps = find_steps(codes, _FLAT, max(0.0, largest) + 0.25, grid.scale / 1.13, _TURNS)
    if steps is None:
        return None
    return Value(_step_codes(graph, x, steps, parts, path), affine)


def _step_codes(graph: Graph, x: str, steps: Steps, parts: int, path: str) -> str:
    """Codes of a float tensor, uint8; a quarter at a time, since it takes several of its size."""
    flat = graph.reshape(x, (parts, -1), f"{path}.input.rows")
    pieces = _PIECES if parts % _PIECES == 0 else 1
    if pieces == 1:
        codes = _codes_of_rows(graph, flat, steps, parts, path)
    else:
        found = [
            _codes_of_rows(graph, piece, steps, parts // pieces, f"{path}.{index}")
            for index, piece in enumerate(graph.split(flat, pieces, 0, f"{path}.input.pieces"))
        ]
        codes = graph.node("Concat", found, f"{path}.codes.pieces", axis=0)
    shape = graph.node("Shape", [x], f"{path}.shape")
    return graph.node("Reshape", [codes, shape], f"{path}.codes")


def _codes_of_rows(graph: Graph, x: str, steps: Steps, parts: int, path: str) -> str:
    """Codes of a float tensor [parts, n], uint8."""
    scaled = graph.node("Mul", [x, graph.number(1 / steps.width)], f"{path}.scaled")
    floored = graph.node("Floor", [scaled], f"{path}.floored")
    last = steps.first + len(steps.threshold) - 1
    ends = [graph.number(float(steps.first)), graph.number(float(last))]
    within = graph.node("Clip", [floored, *ends], f"{path}.within")
    cells = graph.cast(within, np.int32, f"{path}.cells")

    def look_up(table: Tensor, dtype: type[np.generic], name: str) -> str:
        # Cells below 0 count from the table's end, as ONNX has it for indices.
        rolled = torch.roll(table, steps.first).numpy().astype(dtype)
        held = graph.constant(f"{path}.{name}.table", rolled)
        tables = graph.node("Expand", [held, graph.integers(parts, 1)], f"{path}.{name}.tables")
        return graph.node("GatherElements", [tables, cells], f"{path}.{name}", axis=1)

    threshold = look_up(steps.threshold, np.float32, "threshold")
    is_after = graph.node("GreaterOrEqual", [x, threshold], f"{path}.is_after")
    after, before = (
        look_up(table, np.uint8, name)
        for table, name in ((steps.after, "after"), (steps.before, "before"))
    )
    return graph.node("Where", [is_after, after, before], f"{path}.codes.rows")
