"""Softmax attention, float or quantized, as ONNX nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from torch import nn

from ptq4sam.deploy.codes import LogGrid, softmax_grid
from ptq4sam.deploy.onnx.graph import Graph
from ptq4sam.deploy.onnx.points import cut_points, looked_up, point_codes, points_of
from ptq4sam.deploy.onnx.traced import Traced
from ptq4sam.deploy.onnx.values import (
    dequantize,
    quantize,
    quantized_steps,
    require_quantizing,
    steps_of,
)
from ptq4sam.errors import DeployError
from ptq4sam.families.sam_vit.image_encoder import Attention as EncoderAttention
from ptq4sam.methods.adaptive_granularity import AdaptiveGranularityQuantizer
from ptq4sam.operators.attention import Whole, logits_worth, values_worth
from ptq4sam.quantization import portable
from ptq4sam.quantization.base import Quantizer
from ptq4sam.quantization.portable import MOST_TERMS, apart, rounded_sum
from ptq4sam.quantization.whole import EXACT
from ptq4sam.sam.transformer import Attention as DecoderAttention

_ROLES = ("query", "key", "value")

_DIGIT = 16.0
"""Base of digits of 8-bit steps: sums of 4096 products of 8 bits and a digit are exact."""

Bias = Callable[[str], str]
"""From logits to logits with relative positions."""


@dataclass(frozen=True)
class Operands:
    """Query, key and value by head, as products take them.

    Attributes:
        query: [batch, heads, n, d].
        key: [batch, heads, d, m], times the attention's scale where it is float or ONNX Runtime's.
        value: [batch, heads, m, d].
        steps: the query in steps where it is quantized and the graph exact, else float; for
            relative positions, which pieces of an attention have already.
    """

    query: str
    key: str
    value: str
    steps: str = ""


def attention_quantizer(attention: nn.Module, role: str) -> Quantizer | None:
    """The quantizer of "query", "key", "value" or "softmax"; None in a float attention."""
    quantizer = getattr(attention.core, f"{role}_quantizer", None)
    return quantizer if isinstance(quantizer, Quantizer) else None


def _has_whole_points(attention: nn.Module) -> bool:
    quantizer = attention_quantizer(attention, "softmax")
    return isinstance(quantizer, AdaptiveGranularityQuantizer)


def operands(
    graph: Graph,
    attention: EncoderAttention | DecoderAttention,
    projected: Sequence[str],
    tokens: int,
    path: str,
) -> Operands:
    """Quantize query, key and value [batch, ..., heads * d] and split them by head.

    The attention's scale goes into the key, whose factor it is where the key is quantized.

    Args:
        graph: where nodes go.
        attention: owner of the quantizers.
        projected: query, key and value, float.
        tokens: in each; 0 for sizes to keep.
        path: of the attention.
    """
    heads, found = attention.num_heads, []

    def by_head(x: str, role: str, path: str) -> str:
        # A -1 could not be told from an attention without prompts.
        x = graph.reshape(x, (0, tokens, heads, _head_dim(attention)), f"{path}.split")
        # Keys lie as the product takes them.
        return graph.transpose(x, (0, 2, 3, 1) if role == "key" else (0, 2, 1, 3), path)

    steps = ""
    for role, x in zip(_ROLES, projected, strict=True):
        inner = f"{path}.{role}"
        value = quantize(graph, x, attention_quantizer(attention, role), f"{inner}_quantizer")
        whole = value.affine is not None and (
            graph.multiplies_steps or (role == "value" and _has_whole_points(attention))
        )
        if whole:
            x = steps_of(graph, value, inner)
        elif role == "key" and value.affine is None:
            x = graph.node(
                "Mul", [value.name, graph.number(attention.core.scale)], f"{inner}.scaled"
            )
        else:
            x = dequantize(graph, value, inner, attention.core.scale if role == "key" else 1.0)
        found.append(by_head(x, role, inner))
        if role == "query":
            steps = found[0]
            if graph.exact and value.affine is not None and not whole and has_positions(attention):
                inner = f"{inner}.steps"
                steps = by_head(steps_of(graph, value, inner), role, inner)
    return Operands(found[0], found[1], found[2], steps)


def _head_dim(attention: EncoderAttention | DecoderAttention) -> int:
    encoder = isinstance(attention, EncoderAttention)
    projection = cast(nn.Linear, attention.proj if encoder else attention.out_proj)
    return projection.in_features // attention.num_heads


def has_positions(attention: nn.Module) -> bool:
    """Whether an attention has relative positions."""
    return bool(getattr(attention, "use_rel_pos", False))


def attend(
    graph: Graph,
    attention: EncoderAttention | DecoderAttention,
    given: Operands,
    path: str,
    keys: int,
    bias: Bias | None = None,
    parts: int | None = None,
) -> str:
    """softmax(query key scale + bias) value: [batch, heads, n, d].

    Args:
        graph: where nodes go.
        attention: owner of the quantizers.
        given: the operands.
        path: of the attention.
        keys: how many there are at most.
        bias: adds relative positions.
        parts: a divisor of batch * heads * n, see `points.looked_up`; by default the number of
            heads.

    Raises:
        DeployError: there are too many keys for exact sums.
    """
    query, key, value, softmax = (
        attention_quantizer(attention, role) for role in (*_ROLES, "softmax")
    )
    if graph.multiplies_steps and query is not None and key is not None:
        worth = logits_worth(query, key, attention.core.scale, _head_dim(attention))
        inner = f"{path}.logits"
        sums = _sums_of_steps(graph, given.query, given.key, worth.largest, inner)
        logits = _worth(sums, worth)
    else:
        logits = graph.node("MatMul", [given.query, given.key], f"{path}.logits")
    if bias is not None:
        logits = bias(logits)
    shares = _softmax(graph, logits, softmax is not None, keys, path)
    if softmax is None or value is None:
        return graph.node("MatMul", [shares, given.value], f"{path}.attended")
    inner, parts = f"{path}.softmax_quantizer", attention.num_heads if parts is None else parts
    worth = values_worth(softmax, value)
    if isinstance(softmax, AdaptiveGranularityQuantizer):
        require_quantizing(softmax, inner)
        cut = (worth.largest, keys, value.grid.largest_step)
        return _worth(_sums_of_points(graph, softmax, shares, given.value, cut, path, parts), worth)
    weights = quantize(graph, shares, softmax, inner)
    if graph.multiplies_steps:
        largest = min(worth.largest, keys * softmax.grid.largest_step * value.grid.largest_step)
        steps = steps_of(graph, weights, f"{path}.softmax")
        return _worth(_sums_of_steps(graph, steps, given.value, largest, path), worth)
    factors = [dequantize(graph, weights, f"{path}.softmax"), given.value]
    return graph.node("MatMul", factors, f"{path}.attended")


def _softmax(graph: Graph, logits: str, quantized: bool, keys: int, path: str) -> str:
    if not (quantized and graph.exact):
        return graph.node("Softmax", [logits], f"{path}.softmax", axis=-1)
    if keys > MOST_TERMS:
        raise DeployError(
            f"{path} attends to {keys} places, sums are exact for {MOST_TERMS}: export a model "
            "of smaller pictures"
        )
    return portable.softmax(Traced(graph, logits, f"{path}.softmax")).name


def _sums_of_steps(graph: Graph, left: str, right: str, largest: float, path: str) -> Traced:
    """Sums of products of two activations in steps, each at most `largest`.

    Where float32 would round them they are those of two digits of the right ones: OpenVINO may
    multiply integers or not.
    """
    factors = [Traced(graph, right, f"{path}.right")]
    if largest > EXACT:
        high = (factors[0] * (1 / _DIGIT)).round()
        factors = [quantized_steps(digit) for digit in (high, factors[0] - high * _DIGIT)]
    sums = [
        Traced(graph, graph.node("MatMul", [left, factor.name], f"{path}.sums"), path)
        for factor in factors
    ]
    return sums[0] if len(sums) == 1 else rounded_sum([sums[0] * _DIGIT, sums[1]])


def _sums_of_points(
    graph: Graph,
    quantizer: AdaptiveGranularityQuantizer,
    shares: str,
    value: str,
    cut: tuple[float, int, float],
    path: str,
    parts: int,
) -> Traced:
    """Sums over keys of whole points times values in steps; `cut` is what `cut_points` needs."""
    inner, grid = f"{path}.softmax_quantizer", cast(LogGrid, softmax_grid(quantizer))
    codes = point_codes(graph, shares, quantizer, grid, inner, parts)
    points = points_of(quantizer, grid)
    pieces = cut_points(points, *cut) if graph.exact and cut[0] > EXACT else [(points, 1.0)]
    sums = []
    for number, (table, unit) in enumerate(pieces):
        piece = looked_up(graph, codes, table, shares, f"{inner}.points.{number}", parts)
        product = graph.node("MatMul", [piece, value], f"{path}.sums.{number}")
        found = Traced(graph, product, path)
        sums.append(found if unit == 1.0 else found * unit)
    return rounded_sum(sums)


def _worth(sums: Traced, worth: Whole) -> str:
    # Apart, or OpenVINO multiplies one of the operands with what the sums are worth.
    return apart(apart(sums) * float(worth.step)).name
