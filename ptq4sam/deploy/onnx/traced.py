"""Tensors of a graph that compute like torch's, for functions that are written once for both."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ptq4sam.deploy.onnx.graph import Graph


@dataclass(frozen=True)
class Traced:
    """A float32 tensor of the graph; each operation adds a node (`quantization/portable.py`).

    Attributes:
        graph: where nodes go.
        name: of the tensor.
        path: that names of nodes begin with.
    """

    graph: Graph
    name: str
    path: str

    def node(self, kind: str, *others: str, **attributes: object) -> Traced:
        """The result of a node of this tensor and others."""
        name = f"{self.path}.{kind.lower()}"
        found = self.graph.node(kind, [self.name, *others], name, **attributes)
        return replace(self, name=found)

    def __add__(self, other: Traced | float, /) -> Traced:
        return self.node("Add", self._operand(other))

    def __sub__(self, other: Traced | float, /) -> Traced:
        return self.node("Sub", self._operand(other))

    def __mul__(self, other: Traced | float, /) -> Traced:
        return self.node("Mul", self._operand(other))

    def abs(self) -> Traced:
        """Absolute values."""
        return self.node("Abs")

    def round(self) -> Traced:
        """Nearest whole numbers, half to even."""
        return self.node("Round")

    def sqrt(self) -> Traced:
        """Square roots."""
        return self.node("Sqrt")

    def reciprocal(self) -> Traced:
        """1 / x; runtimes have faster nodes for it, which are not always rounded right."""
        one = replace(self, name=self.graph.number(1.0))
        return one.node("Div", self.name)

    def at_least(self, bound: float) -> Traced:
        """1 where a number reaches a bound, else 0."""
        found = self.node("GreaterOrEqual", self.graph.number(bound))
        return replace(found, name=self.graph.cast(found.name, np.float32, f"{self.path}.reached"))

    def clamp(self, min: float | None = None, max: float | None = None) -> Traced:
        """Numbers cut to bounds.

        Not by Clip, past which OpenVINO's low-precision passes move a factor that stands before it.
        """
        found = self
        if min is not None:
            found = found.node("Max", self.graph.number(min))
        return found if max is None else found.node("Min", self.graph.number(max))

    def amax(self, dim: int, keepdim: bool = False) -> Traced:
        """Largest numbers along an axis."""
        return self._reduced("ReduceMax", dim, keepdim)

    def sum(self, dim: int, keepdim: bool = False) -> Traced:
        """Sums along an axis."""
        return self._reduced("ReduceSum", dim, keepdim)

    def narrow(self, dim: int, start: int, length: int) -> Traced:
        """So many elements of an axis from the first one."""
        ends = self.graph.integers(start), self.graph.integers(start + length)
        return self.node("Slice", *ends, self.graph.integers(dim))

    def called(self, name: str) -> str:
        """The tensor under a name of its own."""
        return self.graph.node("Identity", [self.name], name)

    def _reduced(self, kind: str, dim: int, keepdim: bool) -> Traced:
        return self.node(kind, self.graph.integers(dim), keepdims=int(keepdim))

    def _operand(self, other: Traced | float) -> str:
        return other.name if isinstance(other, Traced) else self.graph.number(other)
