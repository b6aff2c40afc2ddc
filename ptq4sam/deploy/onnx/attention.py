"""Softmax attention, float or quantized, as ONNX nodes; logits of too many bytes in pieces."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ptq4sam.deploy.onnx.graph import Graph
from ptq4sam.deploy.onnx.lowering import operator
from ptq4sam.deploy.onnx.moves import UNKNOWN, Permute
from ptq4sam.deploy.onnx.sums import SUMS, sums_of_steps, worth_of_sums
from ptq4sam.deploy.onnx.traced import Traced
from ptq4sam.deploy.onnx.values import (
    Value,
    codes_of,
    dequantize,
    quantize,
    steps_of,
)
from ptq4sam.errors import DeployError
from ptq4sam.operators.attention import QuantizedSoftmaxAttention, SoftmaxAttention
from ptq4sam.operators.attention_products import by_head, logits_worth, values_worth
from ptq4sam.quantization import portable
from ptq4sam.quantization.grids import PointGrid
from ptq4sam.quantization.portable import MOST_TERMS, apart

_ROLES = ("query", "key", "value")
_FLOAT_BYTES = 4
_MOST_PARTS = 64

Terms = tuple[Traced, ...]
Take = Callable[[str, str, slice], str]
"""From the name of a tensor, a path, and which heads it has, to the name of what a product takes.
"""

BIASES: dict[type, Callable[[Any, Traced, Tensor | None], Terms]] = {}
"""What writes a bias of logits, by its type.

Called with the bias, the query [batch, heads, n, d] and what 1 of it is worth, if it is in steps,
[] or [heads, 1, 1], else None. Gives terms [batch or 1, heads or 1, n, *keys], to be added to each
other, then to logits.
"""


@dataclass(frozen=True)
class _Operands:
    """What is attended to.

    Attributes:
        query: [batch, heads, n, d].
        key: [batch, heads, d, m].
        value: [batch, heads, m, d].
        takes: how a product takes each of these three.
        terms: of the bias.
        heads: which ones of all these are.
    """

    query: Traced
    key: Traced
    value: Traced
    takes: tuple[Take, Take, Take]
    terms: Terms = ()
    heads: slice = field(default_factory=lambda: slice(None))

    def split(self, parts: int, axis: int, path: str) -> list[_Operands]:
        """Cut into equal parts along the axis of batch, heads or queries."""
        if parts == 1:
            return [self]
        every = [self.query, self.key, self.value, *self.terms]
        cut = [
            [x] * parts
            if x.shape[axis] == 1 or (axis == 2 and x in (self.key, self.value))
            else _split(x, parts, axis, f"{path}.{number}")
            for number, x in enumerate(every)
        ]
        side = self.query.shape[1] // parts
        heads = [
            slice(place * side, (place + 1) * side) if axis == 1 else self.heads
            for place in range(parts)
        ]
        return [
            _Operands(q, k, v, self.takes, tuple(terms), its)
            for (q, k, v, *terms), its in zip(zip(*cut, strict=True), heads, strict=True)
        ]

    def taken(self, path: str) -> tuple[Traced, Traced, Traced]:
        """Query, key and value as products take them."""
        three = zip(_ROLES, (self.query, self.key, self.value), self.takes, strict=True)
        names = [(x, take(x.name, f"{path}.{role}", self.heads)) for role, x, take in three]
        query, key, value = (x.new(name, x.shape) for x, name in names)
        return query, key, value


@operator(SoftmaxAttention)
def softmax_attention(
    graph: Graph,
    core: SoftmaxAttention,
    query: Traced,
    key: Traced,
    value: Traced,
    bias: Any = None,
) -> Traced:
    """softmax(query key scale + bias) value, float; see `_attention`."""
    return _attention(graph, _Core(core.scale), query, key, value, bias)


@operator(QuantizedSoftmaxAttention)
def quantized_attention(
    graph: Graph,
    core: QuantizedSoftmaxAttention,
    query: Traced,
    key: Traced,
    value: Traced,
    bias: Any = None,
) -> Traced:
    """The same on grids; see `_attention`."""
    return _attention(graph, _Core(core.scale, core), query, key, value, bias)


@dataclass(frozen=True)
class _Core:
    """An attention.

    Attributes:
        scale: of products of query and key.
        slots: the operator whose quantizers move its tensors; None of a float one.
    """

    scale: float
    slots: QuantizedSoftmaxAttention | None = None

    @property
    def has_table(self) -> bool:
        """Whether points of softmax outputs are looked up in a table."""
        return self.slots is not None and type(_softmax_grid(self.slots)) in SUMS

    def multiplies_steps(self, graph: Graph, *roles: str) -> bool:
        """Whether the product of these is of steps: as the dialect says, or for scales of heads."""
        if self.slots is None:
            return False
        by_heads = any(self.slots.quantizer(role).step.dim() > 0 for role in roles)
        return graph.multiplies_steps or by_heads


def _softmax_grid(slots: QuantizedSoftmaxAttention) -> PointGrid:
    return slots.softmax_quantizer.grid_in_use()


def _attention(
    graph: Graph, core: _Core, query: Traced, key: Traced, value: Traced, bias: Any
) -> Traced:
    """softmax(query key scale + bias) value.

    Args:
        graph: where nodes go.
        core: the operator.
        query: [batch, heads, n, d].
        key: [batch, heads, m, d].
        value: [batch, heads, m, d].
        bias: of logits; its type is a key of BIASES.

    Returns:
        [batch, heads, n, d].

    Raises:
        DeployError: there are too many keys for exact sums, or the bias is of another type.
    """
    given, path = core.slots, graph.path
    logits_of_steps = core.multiplies_steps(graph, *_ROLES[:2])
    values_of_steps = core.multiplies_steps(graph, _ROLES[2]) or core.has_table
    slots = [None if given is None else given.quantizer(role) for role in _ROLES]

    held = [
        codes_of(x, slot, f"{path}.{role}_quantizer")
        for x, slot, role in zip((query, key, value), slots, _ROLES, strict=True)
    ]

    def operand(place: int, take: Callable[[Graph, Value, str], str]) -> tuple[Traced, Take]:
        codes, behind = held[place]
        if graph.dialect.dequantizes == "products" and codes.affine is not None:
            return behind, lambda name, inner, heads: take(graph, codes.part(name, heads), inner)
        name = take(graph, codes, f"{path}.{_ROLES[place]}")
        return behind.of(name), lambda name, _inner, _heads: name

    def scaled(graph: Graph, codes: Value, inner: str) -> str:
        if codes.affine is None:
            return graph.node("Mul", [codes.name, graph.number(core.scale)], f"{inner}.scaled")
        return dequantize(graph, codes, inner, core.scale)

    (q, take_q), (k, take_k), (v, take_v) = (
        operand(0, steps_of if logits_of_steps else dequantize),
        operand(1, steps_of if logits_of_steps else scaled),
        operand(2, steps_of if values_of_steps else dequantize),
    )
    # Keys lie as the product takes them.
    operands = _Operands(q, k.moved(Permute((0, 1, 3, 2))), v, (take_q, take_k, take_v))
    if bias is not None:
        if type(bias) not in BIASES:
            raise DeployError(
                f"{path} adds a {type(bias).__name__}, which has no form in a graph: it cannot be "
                "exported"
            )
        of_steps = given is not None and (graph.portable or logits_of_steps)
        step = by_head(given.query_quantizer.step) if given and of_steps else None
        placing, (codes, behind) = q, held[0]
        if graph.dialect.dequantizes == "products":
            take = dequantize if step is None else steps_of
            placing = behind.of(take(graph, codes, f"{path}.query.placing"))
        operands = replace(operands, terms=BIASES[type(bias)](bias, placing, step))
    name = _in_pieces(core, operands, path)
    every = (query, key, value, *operands.terms)
    exact = given is not None and graph.portable and all(x.exact for x in every)
    if given is not None:
        graph.quantized(f"{path}.softmax_quantizer", exact)
    return Traced(graph, name, (*query.shape[:3], value.shape[3]), exact=exact)


def _split(x: Traced, parts: int, axis: int, path: str) -> list[Traced]:
    side = x.shape[axis] // parts
    shape = (*x.shape[:axis], side, *x.shape[axis + 1 :])
    names = x.graph.split(x.name, parts, axis, path)
    return [Traced(x.graph, name, shape, exact=x.exact) for name in names]


def _in_pieces(core: _Core, given: _Operands, path: str) -> str:
    """Attend; to logits of too many bytes by groups of batch, or by heads and some queries."""
    graph, dialect = given.query.graph, given.query.graph.dialect
    batch, heads, queries, _ = given.query.shape
    row_bytes = _FLOAT_BYTES * given.key.shape[3]
    if max(*given.query.shape, *given.key.shape) >= UNKNOWN:
        return _attend(core, given, path)
    if heads * queries * row_bytes <= dialect.whole_bytes:
        groups = 1
        if dialect.group_bytes is not None:
            fitting = dialect.group_bytes // (heads * queries * row_bytes)
            groups = batch // _divisor(batch, fitting)
        return _joined(core, given.split(groups, 0, f"{path}.groups"), 0, f"{path}.groups")
    rows = _divisor(queries, dialect.piece_bytes // row_bytes)
    attended = []
    for head, part in enumerate(given.split(heads, 1, f"{path}.heads")):
        inner = f"{path}.heads.{head}"
        attended.append(_joined(core, part.split(queries // rows, 2, f"{inner}.parts"), 2, inner))
    return graph.node("Concat", attended, f"{path}.attended", axis=1)


def _divisor(number: int, most: int) -> int:
    """The largest divisor that is not above a number; 1 at least."""
    return next(
        divisor for divisor in range(min(number, max(1, most)), 0, -1) if number % divisor == 0
    )


def _joined(core: _Core, parts: list[_Operands], axis: int, path: str) -> str:
    if len(parts) == 1:
        return _attend(core, parts[0], path)
    attended = [_attend(core, part, f"{path}.{index}") for index, part in enumerate(parts)]
    return parts[0].query.graph.node("Concat", attended, f"{path}.attended", axis=axis)


def _attend(core: _Core, given: _Operands, path: str) -> str:
    graph = given.query.graph
    slots = core.slots
    keys, head_dim = min(given.key.shape[3], MOST_TERMS + 1), given.query.shape[3]
    if given.key.shape[3] >= UNKNOWN:
        keys = MOST_TERMS
    query, key, value = given.taken(path)
    if slots is not None and core.multiplies_steps(graph, *_ROLES[:2]):
        worth = logits_worth(slots.query_quantizer, slots.key_quantizer, core.scale, head_dim)
        worth = worth.of_heads(given.heads)
        sums = sums_of_steps(query, key, worth.largest, f"{path}.logits")
        logits = worth_of_sums(sums, worth)
    else:
        logits = graph.node("MatMul", [query.name, key.name], f"{path}.logits")
    logits = _placed(graph, logits, given.terms, f"{path}.logits")
    shape = (*given.query.shape[:3], given.key.shape[3])
    shares = _softmax(Traced(graph, logits, shape), slots is not None, keys)
    if slots is None:
        return graph.node("MatMul", [shares, value.name], f"{path}.attended")
    softmax, values = slots.softmax_quantizer, slots.value_quantizer
    worth = values_worth(softmax, values).of_heads(given.heads)
    queries, heads = given.query.shape[2], given.query.shape[1]
    parts = heads if queries >= UNKNOWN else _divisor(queries, _MOST_PARTS)
    inner = f"{path}.softmax_quantizer"
    if core.has_table:
        cut = (worth.largest, keys, values.grid.largest_step)
        sum_up = SUMS[type(_softmax_grid(slots))]
        return worth_of_sums(sum_up(graph, softmax, shares, value.name, cut, path, parts), worth)
    weights = quantize(graph, shares, softmax, inner)
    if core.multiplies_steps(graph, _ROLES[2]):
        most = keys * softmax.grid.largest_step * values.grid.largest_step
        steps = value.new(steps_of(graph, weights, f"{path}.softmax"), shape)
        return worth_of_sums(sums_of_steps(steps, value, min(worth.largest, most), path), worth)
    factors = [dequantize(graph, weights, f"{path}.softmax"), value.name]
    attended = graph.node("MatMul", factors, f"{path}.attended")
    # Apart, or ONNX Runtime quantizes sums by one quotient of scales: other codes at halves.
    return apart(value.new(attended, value.shape)).name if graph.portable else attended


def _placed(graph: Graph, logits: str, terms: Terms, path: str) -> str:
    """Logits [batch, heads, n, m] and a bias, whose keys may lie in a grid."""
    if not terms:
        return logits
    sides = [max(term.shape[axis] for term in terms) for axis in range(3, terms[0].ndim)]
    if len(sides) > 1:
        logits = graph.reshape(logits, (0, 0, 0, *sides), f"{path}.grid")
    bias = terms[0].name
    for term in terms[1:]:
        bias = graph.node("Add", [bias, term.name], f"{path}.bias")
    both = graph.node("Add", [logits, bias], f"{path}.placed")
    return (
        graph.reshape(both, (0, 0, 0, math.prod(sides)), f"{path}.all") if len(sides) > 1 else both
    )


def _softmax(logits: Traced, quantized: bool, keys: int) -> str:
    if not (quantized and logits.graph.portable):
        return logits.node("Softmax", axis=-1).name
    if keys > MOST_TERMS:
        raise DeployError(
            f"{logits.graph.path} attends to {logits.shape[-1]} places, sums are "
            f"exact for {MOST_TERMS}: export a model of smaller pictures"
        )
    return portable.softmax(logits).name
