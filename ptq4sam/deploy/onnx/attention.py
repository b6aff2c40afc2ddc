"""Softmax attention, float or quantized, as ONNX nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from torch import nn

from ptq4sam.deploy.onnx.graph import Graph
from ptq4sam.deploy.onnx.values import dequantize, quantize
from ptq4sam.methods.adaptive_granularity import AdaptiveGranularityQuantizer
from ptq4sam.model.attention import values_worth
from ptq4sam.quantization.base import Quantizer
from ptq4sam.quantization.whole import EXACT
from ptq4sam.sam.image_encoder import Attention as EncoderAttention
from ptq4sam.sam.transformer import Attention as DecoderAttention

_ROLES = ("query", "key", "value")

Bias = Callable[[str], str]
"""From logits to logits with relative positions."""


@dataclass(frozen=True)
class Operands:
    """Query, scaled key and value by head: [batch, heads, n, d], [.., d, m] and [.., m, d]."""

    query: str
    key: str
    value: str


def attention_quantizer(attention: nn.Module, role: str) -> Quantizer | None:
    """The quantizer of "query", "key", "value" or "softmax"; None in a float attention."""
    quantizer = getattr(attention, f"{role}_quantizer", None)
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
    for role, x in zip(_ROLES, projected, strict=True):
        quantizer = attention_quantizer(attention, role)
        value = quantize(graph, x, quantizer, f"{path}.{role}_quantizer")
        is_key = role == "key"
        if role == "value" and _has_whole_points(attention):
            value = value.in_steps()
        x = dequantize(graph, value, f"{path}.{role}", attention.scale if is_key else 1.0)
        x = graph.reshape(x, (0, tokens, heads, -1), f"{path}.{role}.split")
        # Keys lie as the product takes them.
        found.append(graph.transpose(x, (0, 2, 3, 1) if is_key else (0, 2, 1, 3), f"{path}.{role}"))
    return Operands(*found)


def attend(
    graph: Graph,
    attention: EncoderAttention | DecoderAttention,
    given: Operands,
    path: str,
    bias: Bias | None = None,
    parts: int | None = None,
) -> str:
    """softmax(query key scale + bias) value: [batch, heads, n, d].

    `parts` is a divisor of batch * heads * n, see `quantize`; by default the number of heads.
    """
    logits = graph.node("MatMul", [given.query, given.key], f"{path}.logits")
    if bias is not None:
        logits = bias(logits)
    quantizer = attention_quantizer(attention, "softmax")
    softmax = _softmax(graph, logits, quantizer is not None, path)
    parts = attention.num_heads if parts is None else parts
    weights = quantize(graph, softmax, quantizer, f"{path}.softmax_quantizer", parts)
    if quantizer is not None and _has_whole_points(attention):
        # Sums of whole numbers are those of the simulation in whatever order.
        worth = values_worth(quantizer, cast(Quantizer, attention.value_quantizer))
        factors, double = [weights.name, given.value], worth.largest > EXACT and graph.has_float64
        if double:
            # Without float64, in OpenVINO, sums are nearly exact.
            factors = [
                graph.cast(x, np.float64, f"{path}.double.{n}") for n, x in enumerate(factors)
            ]
        sums = graph.node("MatMul", factors, f"{path}.sums")
        if double:
            sums = graph.cast(sums, np.float32, f"{path}.sums.float32")
        return graph.node("Mul", [sums, graph.number(float(worth.step))], f"{path}.attended")
    factors = [dequantize(graph, weights, f"{path}.softmax"), given.value]
    return graph.node("MatMul", factors, f"{path}.attended")


def _softmax(graph: Graph, logits: str, quantized: bool, path: str) -> str:
    """In float64, rounded once, where it is quantized and the runtime has float64."""
    if not (quantized and graph.has_float64):
        return graph.node("Softmax", [logits], f"{path}.softmax", axis=-1)
    # By its parts: ONNX Runtime's own softmax of float64 takes one number after the other.
    last = graph.integers(-1)
    largest = graph.node("ReduceMax", [logits, last], f"{path}.largest", keepdims=1)
    logits, largest = (
        graph.cast(x, np.float64, f"{path}.{name}.float64")
        for x, name in ((logits, "logits"), (largest, "largest"))
    )
    below = graph.node("Sub", [logits, largest], f"{path}.below")
    powers = graph.node("Exp", [below], f"{path}.powers")
    total = graph.node("ReduceSum", [powers, last], f"{path}.total", keepdims=1)
    shares = graph.node("Div", [powers, total], f"{path}.shares")
    return graph.cast(shares, np.float32, f"{path}.softmax")
