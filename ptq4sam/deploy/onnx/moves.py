"""Reshaping, permuting, cutting and padding: what changes places and no numbers.

A traced tensor remembers its moves and becomes nodes when it is needed, so that codes are moved,
which are a quarter of the float tensor, and only those parts of a product are computed that
somebody takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptq4sam.deploy.onnx.graph import Graph
from ptq4sam.errors import DeployError

Shape = tuple[int, ...]

UNKNOWN = 2**24
"""Sizes from here on stand for those that are known when the graph runs."""

_END = 2**63 - 1


@dataclass(frozen=True)
class Reshape:
    """Another shape of the same numbers in their order."""

    shape: Shape


@dataclass(frozen=True)
class Permute:
    """Axes in another order."""

    order: tuple[int, ...]


@dataclass(frozen=True)
class Cut:
    """Elements of an axis: first, last (excluded), distance."""

    axis: int
    first: int
    last: int
    step: int = 1


@dataclass(frozen=True)
class Pad:
    """Zeros before and behind, by axis."""

    before: tuple[int, ...]
    behind: tuple[int, ...]


Move = Reshape | Permute | Cut | Pad
Moves = tuple[Move, ...]


def shape_behind(shape: Shape, moves: Moves) -> Shape:
    """The shape of what moves make of a tensor."""
    for move in moves:
        if isinstance(move, Reshape):
            shape = move.shape
        elif isinstance(move, Permute):
            shape = tuple(shape[axis] for axis in move.order)
        elif isinstance(move, Cut):
            length = len(range(move.first, move.last, move.step))
            shape = (*shape[: move.axis], length, *shape[move.axis + 1 :])
        else:
            shape = tuple(map(sum, zip(move.before, shape, move.behind, strict=True)))
    return shape


def with_move(moves: Moves, move: Move, shape: Shape) -> Moves:
    """Moves and one more, from a tensor of this shape; two become one where they can."""
    last = moves[-1] if moves else None
    if isinstance(move, Permute) and isinstance(last, Permute):
        moves, move = moves[:-1], Permute(tuple(last.order[axis] for axis in move.order))
    elif isinstance(move, Reshape) and isinstance(last, Reshape):
        moves = moves[:-1]
    elif isinstance(move, Reshape) and move.shape == shape:
        return moves
    if isinstance(move, Permute) and move.order == tuple(range(len(move.order))):
        return moves
    if isinstance(move, Pad) and not any((*move.before, *move.behind)):
        return moves
    return (*moves, move)


def emit(
    graph: Graph, x: str, shape: Shape, moves: Moves, path: str, zero: NDArray[np.generic]
) -> str:
    """Write the nodes of moves of a tensor of a shape; `zero` is what stands for 0."""
    for move in moves:
        if isinstance(move, Reshape):
            x = graph.reshape(x, _sizes(shape, move.shape, path), f"{path}.reshaped")
        elif isinstance(move, Permute):
            x = graph.transpose(x, move.order, f"{path}.permuted")
        elif isinstance(move, Cut):
            last = _END if move.last >= shape[move.axis] else move.last
            if move.first >= UNKNOWN or UNKNOWN <= last < _END:
                raise DeployError(f"{path} counts from the end of an axis of unknown size")
            bounds = [graph.integers(n) for n in (move.first, last, move.axis, move.step)]
            x = graph.node("Slice", [x, *bounds], f"{path}.cut")
        else:
            fill = graph.shared(f"fill.{zero.dtype}.{zero}", zero)
            margins = graph.integers(*move.before, *move.behind)
            x = graph.node("Pad", [x, margins, fill], f"{path}.padded")
        shape = shape_behind(shape, (move,))
    return x


def taken_outputs(shape: Shape, moves: Moves) -> tuple[Tensor, Moves] | None:
    """Which of the last axis' elements moves take, and the moves of these alone.

    They begin with a reshape that splits the last axis, permute, and cut one of its parts.

    Returns:
        Indices, and moves that begin with [*shape[:-1], len(indices)]; None for other moves.
    """
    split, rest = moves[0] if moves else None, moves[1:]
    parts = _parts_of_last(shape, split.shape) if isinstance(split, Reshape) else None
    if not isinstance(split, Reshape) or parts is None:
        return None
    axes = list(range(len(split.shape)))
    for place, move in enumerate(rest):
        if isinstance(move, Permute):
            axes = [axes[axis] for axis in move.order]
        elif isinstance(move, Cut) and axes[move.axis] >= parts:
            axis = axes[move.axis] - parts
            numbers = torch.arange(shape[-1], device="cpu").reshape(split.shape[parts:])
            chosen = numbers.movedim(axis, 0)[move.first : move.last : move.step].movedim(0, axis)
            smaller = Reshape((*split.shape[:parts], *chosen.shape))
            return chosen.flatten(), (smaller, *rest[:place], *rest[place + 1 :])
        else:
            return None
    return None


def _parts_of_last(shape: Shape, split: Shape) -> int | None:
    """The axis where the parts of the last axis begin."""
    return next(
        (
            axis
            for axis in range(len(split))
            if math.prod(split[axis:]) == shape[-1]
            and math.prod(split[:axis]) == math.prod(shape[:-1])
        ),
        None,
    )


def _sizes(before: Shape, after: Shape, path: str) -> Sequence[int]:
    """The target of a reshape: 0 where an unknown size stays at its place, -1 for another."""
    sizes = [
        size if size < UNKNOWN else 0 if before[axis : axis + 1] == (size,) else -1
        for axis, size in enumerate(after)
    ]
    if sizes.count(-1) > 1:
        raise DeployError(f"{path} joins more than one size that is not known before it runs")
    return sizes
