"""Softmax attention, float or quantized, as ONNX nodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from ptq4sam.deploy.onnx.graph import Graph
from ptq4sam.deploy.onnx.values import Value, dequantize, quantize
from ptq4sam.quantization.base import Quantizer

Bias = Callable[[str, str], str]
"""From logits and the float query to logits with relative positions."""


@dataclass(frozen=True)
class Operands:
    """Query, key and value by head: [batch, heads, n, d], [batch, heads, d, m], [.., m, d]."""

    query: Value
    key: Value
    value: Value


def attention_quantizer(attention: nn.Module, role: str) -> Quantizer | None:
    """The quantizer of "query", "key", "value" or "softmax"; None in a float attention."""
    quantizer = getattr(attention, f"{role}_quantizer", None)
    return quantizer if isinstance(quantizer, Quantizer) else None


def operand(
    graph: Graph, attention: nn.Module, role: str, x: str, sizes: tuple[int, ...], path: str
) -> Value:
    """Quantize a projection [batch, ..., heads * d] and split it by head.

    Args:
        graph: where nodes go.
        attention: owner of the quantizers.
        role: "query", "key" or "value".
        x: the projection, float.
        sizes: its shape as [batch, tokens, heads, d], 0 for sizes to keep.
        path: of the attention.
    """
    value = quantize(graph, x, attention_quantizer(attention, role), f"{path}.{role}_quantizer")
    split = graph.reshape(value.name, sizes, f"{path}.{role}.split")
    # Keys lie as the product takes them.
    order = (0, 2, 3, 1) if role == "key" else (0, 2, 1, 3)
    return value.renamed(graph.transpose(split, order, f"{path}.{role}"))


def attend(
    graph: Graph,
    attention: nn.Module,
    operands: Operands,
    scale: float,
    path: str,
    bias: Bias | None = None,
) -> str:
    """softmax(query key scale + bias) value: [batch, heads, n, d]."""
    factors = [
        dequantize(graph, operands.query, f"{path}.scaled_query", scale),
        dequantize(graph, operands.key, f"{path}.key"),
    ]
    logits = graph.node("MatMul", factors, f"{path}.logits")
    if bias is not None:
        logits = bias(logits, dequantize(graph, operands.query, f"{path}.query"))
    softmax = graph.node("Softmax", [logits], f"{path}.softmax", axis=-1)
    quantizer = attention_quantizer(attention, "softmax")
    weights = quantize(graph, softmax, quantizer, f"{path}.softmax_quantizer")
    factors = [
        dequantize(graph, weights, f"{path}.softmax"),
        dequantize(graph, operands.value, f"{path}.value"),
    ]
    return graph.node("MatMul", factors, f"{path}.attended")
