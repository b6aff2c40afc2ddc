"""Tensors of a graph that compute like torch's, so that a module's own forward writes nodes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ptq4sam.deploy.onnx.graph import Graph
from ptq4sam.deploy.onnx.moves import (
    Cut,
    Move,
    Moves,
    Shape,
    emit,
    shape_behind,
    taken_outputs,
    with_move,
)
from ptq4sam.errors import DeployError

Lowering = Callable[..., Any]
FUNCTIONS: dict[str, Lowering] = {}
"""What writes the nodes of torch's functions, by their names (`deploy/onnx/functions.py`)."""

ZERO: NDArray[Any] = np.array(0, np.float32)


class Product:
    """A tensor whose last axis' elements can be computed without the others.

    Args:
        make: writes the nodes for some of them, or all.
    """

    def __init__(self, make: Callable[[Tensor | None], str]) -> None:
        self.some = make

    @functools.cached_property
    def name(self) -> str:
        """Of the whole tensor."""
        return self.some(None)


class Traced:
    """A float32 tensor of the graph; each operation adds a node.

    Operations of torch come here by its own protocol for classes that are no tensors
    (`__torch_function__`), those of `quantization/portable.py` are methods.

    Args:
        graph: where nodes go.
        source: name of the tensor that is moved, or what computes it.
        shape: its shape.
        moves: from the source to this tensor.
        exact: whether all runtimes give it the simulation's bits.
        zero: what stands for 0 in it, of codes.
    """

    dtype, device, is_meta, requires_grad = torch.float32, torch.device("cpu"), False, False

    def __init__(
        self,
        graph: Graph,
        source: str | Product,
        shape: Sequence[int],
        moves: Moves = (),
        exact: bool = True,
        zero: NDArray[Any] = ZERO,
    ) -> None:
        self.graph, self.exact, self._zero = graph, exact, zero
        self._source, self._base, self._moves = source, tuple(shape), moves

    @functools.cached_property
    def shape(self) -> torch.Size:
        """Sizes; those that are only known when the graph runs are `moves.UNKNOWN` or more."""
        return torch.Size(shape_behind(self._base, self._moves))

    @property
    def ndim(self) -> int:
        """How many axes there are."""
        return len(self.shape)

    def dim(self) -> int:
        """As `ndim`."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """The shape, or one side of it."""
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.shape[0]

    @functools.cached_property
    def name(self) -> str:
        """Of the tensor, whose nodes are written."""
        name, shape, moves = self.unmoved
        return emit(self.graph, name, shape, moves, self.graph.path, self._zero)

    @functools.cached_property
    def unmoved(self) -> tuple[str, Shape, Moves]:
        """The tensor before the moves that keep all of it: its name, its shape, and those moves.

        What is quantized is quantized there.
        """
        source, shape, moves = self._source, self._base, self._moves
        if isinstance(source, Product):
            taken = taken_outputs(shape, moves)
            if taken is None:
                source = source.name
            else:
                outputs, moves = taken
                source, shape = source.some(outputs), (*shape[:-1], len(outputs))
        cuts = [place for place, move in enumerate(moves, 1) if isinstance(move, Cut)]
        first = moves[: cuts[-1]] if cuts else ()
        source = emit(self.graph, source, shape, first, self.graph.path, self._zero)
        return source, shape_behind(shape, first), moves[len(first) :]

    def moved(self, *moves: Move) -> Traced:
        """The same numbers elsewhere; nothing is written yet."""
        found, shape = self._moves, tuple(self.shape)
        for move in moves:
            found, shape = with_move(found, move, shape), shape_behind(shape, (move,))
        return Traced(self.graph, self._source, self._base, found, self.exact, self._zero)

    def of(self, name: str) -> Traced:
        """Another tensor, which makes the same moves."""
        return Traced(self.graph, name, self._base, self._moves, self.exact)

    def new(self, name: str | Product, shape: Sequence[int], exact: bool = True) -> Traced:
        """Another tensor made of this one, which is exact where this is and its making was."""
        return Traced(self.graph, name, shape, exact=exact and self.exact)

    def node(
        self,
        kind: str,
        *others: str,
        shape: Sequence[int] | None = None,
        exact: bool = True,
        **attributes: object,
    ) -> Traced:
        """The result of a node of this tensor and others; by default it has this one's shape."""
        name = f"{self.graph.path}.{kind.lower()}"
        found = self.graph.node(kind, [self.name, *others], name, **attributes)
        return self.new(found, self.shape if shape is None else shape, exact)

    if TYPE_CHECKING:
        # What `functions.py` has; portable functions ask for these.
        # ruff: noqa: D102
        def __add__(self, other: Any, /) -> Traced: ...
        def __sub__(self, other: Any, /) -> Traced: ...
        def __mul__(self, other: Any, /) -> Traced: ...
        def __truediv__(self, other: Any, /) -> Traced: ...
        def __getitem__(self, index: Any, /) -> Traced: ...
        def abs(self) -> Traced: ...
        def round(self) -> Traced: ...
        def sqrt(self) -> Traced: ...
        def reciprocal(self) -> Traced: ...
        def clamp(self, min: Any = None, max: Any = None) -> Traced: ...
        def amax(self, dim: Any, keepdim: bool = False) -> Traced: ...
        def sum(self, dim: Any, keepdim: bool = False) -> Traced: ...

    def at_least(self, bound: float) -> Traced:
        """1 where a number reaches a bound, else 0."""
        found = self.node("GreaterOrEqual", self.graph.number(bound))
        return found.new(
            self.graph.cast(found.name, np.float32, f"{found.name}.number"), self.shape
        )

    def portable(self, *inputs: Traced) -> Traced:
        """The same tensor, made of others by functions of `quantization/portable.py`: exactly."""
        self.exact = all(x.exact for x in inputs)
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(f"{type(self).__name__} has no {name}")
        if not callable(getattr(Tensor, name)):
            raise refused(self, f"asks for torch's {name}")
        return functools.partial(called, name, self)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = "max_pool2d" if func is F.max_pool2d else func.__name__
        return called(name, *args, **(kwargs or {}))


def _operator(name: str) -> Callable[..., Any]:
    return lambda self, *others: called(name, self, *others)


_OPERATORS = """add radd sub rsub mul rmul truediv rtruediv matmul pow neg getitem gt ge lt le"""

for _name in _OPERATORS.split():
    setattr(Traced, f"__{_name}__", _operator(_name))


def called(name: str, /, *arguments: Any, **options: Any) -> Any:
    """What a function of torch gives of traced tensors.

    Raises:
        DeployError: none is known.
    """
    lowering = FUNCTIONS.get(name.strip("_"))
    if lowering is None:
        raise refused(first_traced(arguments), f"calls torch's {name}, unknown in a graph")
    return lowering(*arguments, **options)


def refused(x: Traced, what: str) -> DeployError:
    """The error of what has no form in a graph, by the path of the module that asks for it."""
    return DeployError(f"{x.graph.path} {what}: it cannot be exported")


def first_traced(arguments: Any) -> Traced:
    """The first traced tensor among arguments, or in a list of them."""
    for argument in arguments:
        if isinstance(argument, Traced):
            return argument
        if isinstance(argument, list | tuple) and any(isinstance(x, Traced) for x in argument):
            return first_traced(argument)
    raise ValueError("none of the arguments is traced")
