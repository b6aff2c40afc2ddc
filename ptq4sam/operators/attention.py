"""Softmax attention, the leaf: query, key and value in, what attends out.

Projections, windows and positions are the business of whoever calls it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ptq4sam.operators.arithmetic import Arithmetic, whole_numbers
from ptq4sam.operators.attention_products import (
    AttentionValueProduct,
    QueryKeyProduct,
    Whole,
    by_head,
    logits_worth,
    values_worth,
)
from ptq4sam.operators.base import (
    KEY,
    QUERY,
    SOFTMAX,
    VALUE,
    Product,
    QuantizedOperator,
    Work,
    quantizes,
    work,
)
from ptq4sam.operators.bias import PositionBias
from ptq4sam.operators.watching import unwatched
from ptq4sam.quantization import hard_numbers, portable
from ptq4sam.quantization.fused import fused_exactly
from ptq4sam.quantization.memo import Memo
from ptq4sam.quantization.quantizers import Mode, Quantizer

# Bytes of attention bias that one call of scaled_dot_product_attention may be given. The whole bias
# of a global attention at 1024 px is 12 x 4096 x 4096 floats (805 MB); in pieces it costs nothing
# on a CPU. A GPU stands idle between pieces that are small.
_BIAS_BYTES = {"cpu": 32 * 2**20, "cuda": 2**30}

# Bytes of softmax output computed at once where nothing must see it whole: a global attention at
# 1024 px is 805 MB for ViT-B, of which quantization needs several copies. A CPU's pieces stay in
# its cache.
_SOFTMAX_BYTES = {"cpu": 8 * 2**20, "cuda": 256 * 2**20}


class SoftmaxAttention(nn.Module):
    """softmax(query key^T scale + bias) value.

    Args:
        scale: of the products of query and key.
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: PositionBias | None = None
    ) -> Tensor:
        """Attend.

        Args:
            query: [batch, heads, n, head_dim], not yet scaled.
            key: [batch, heads, m, head_dim].
            value: [batch, heads, m, value_dim].
            bias: gives logits to add.

        Returns:
            [batch, heads, n, value_dim].
        """
        if bias is None:
            return F.scaled_dot_product_attention(query, key, value, scale=self.scale)
        batch, heads, tokens = query.shape[:3]
        rows = tokens // bias.columns
        row_bytes = batch * heads * bias.columns * key.shape[2] * query.itemsize
        allowed = _BIAS_BYTES.get(query.device.type, _BIAS_BYTES["cpu"])
        rows_at_once = max(1, min(rows, allowed // row_bytes))
        # Written in place: results kept in a list would lie between the freed biases in memory.
        attended = query.new_empty(batch, heads, tokens, value.shape[-1])
        for first in range(0, rows, rows_at_once):
            last = min(rows, first + rows_at_once)
            part = slice(first * bias.columns, last * bias.columns)
            terms = bias.of_query(query[:, :, part], slice(None), first, last)
            attended[:, :, part] = F.scaled_dot_product_attention(
                query[:, :, part], key, value, attn_mask=terms, scale=self.scale
            )
        return attended


def softmax_pieces(
    query: Tensor, key: Tensor, columns: int = 1
) -> Iterator[tuple[slice, int, int]]:
    """Pieces of an attention whose softmax is small enough to be held at once.

    Args:
        query: [batch, heads, rows * columns, head_dim].
        key: [batch, heads, m, head_dim].
        columns: queries in a row of their grid.

    Yields:
        Heads, first row and row after the last.
    """
    heads, rows = query.shape[1], query.shape[2] // columns
    row_bytes = query.shape[0] * columns * key.shape[2] * query.itemsize
    allowed = max(1, _SOFTMAX_BYTES.get(query.device.type, 2**24) // row_bytes)
    rows_at_once, heads_at_once = min(rows, allowed), max(1, allowed // rows)
    for head in range(0, heads, heads_at_once):
        for first in range(0, rows, rows_at_once):
            yield slice(head, head + heads_at_once), first, min(rows, first + rows_at_once)


@quantizes(SoftmaxAttention)
class QuantizedSoftmaxAttention(QuantizedOperator):
    """Softmax attention in the open, so that its parts can be quantized.

    A bias is applied to the quantized query.
    """

    slot_names = (QUERY, KEY, VALUE, SOFTMAX)
    kind = "attention"
    query_quantizer: Quantizer
    key_quantizer: Quantizer
    value_quantizer: Quantizer
    softmax_quantizer: Quantizer

    def __init__(
        self,
        source: SoftmaxAttention,
        query: Quantizer,
        key: Quantizer,
        value: Quantizer,
        softmax: Quantizer,
    ) -> None:
        super().__init__()
        self.scale = source.scale
        self.query_quantizer = query
        self.key_quantizer = key
        self.value_quantizer = value
        self.softmax_quantizer = softmax
        self.query_key = QueryKeyProduct(self.scale)
        self.attention_value = AttentionValueProduct()
        self._worths: Memo[tuple[Whole, Whole]] = Memo()
        self._bias: Memo[PositionBias] = Memo()

    def products(self) -> tuple[Product, ...]:
        """Query times key, softmax output times value."""
        return (
            Product("query_key", self.query_key, QUERY, KEY, self.scale),
            Product("attention_value", self.attention_value, SOFTMAX, VALUE),
        )

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: PositionBias | None = None
    ) -> Tensor:
        """As the float operator."""
        if self._computes_whole():
            return self._forward_whole(query, key, value, bias)
        self._worths.clear()
        columns = 1 if bias is None else bias.columns
        query = self.query_quantizer(query)
        key = self.key_quantizer(key)
        value = self.value_quantizer(value)

        def attend(head: slice, first: int, last: int) -> Tensor:
            part = query[:, head, first * columns : last * columns]
            logits: Tensor = self.query_key(part, key[:, head])
            if bias is not None:
                logits.add_(bias.of_query(part, head, first, last))
            attention = self.softmax_quantizer(logits.softmax(dim=-1), value[:, head])
            attended: Tensor = self.attention_value(attention, value[:, head])
            return attended

        learns = self.arithmetic is Arithmetic.LEARNING
        if learns or self.softmax_quantizer.mode is Mode.OBSERVE:
            return attend(slice(None), 0, query.shape[2] // columns)
        result = value.new_empty(*query.shape[:3], value.shape[-1])
        for head, first, last in softmax_pieces(query, key, columns):
            result[:, head, first * columns : last * columns] = attend(head, first, last)
        return result

    @whole_numbers
    def _forward_whole(
        self, query: Tensor, key: Tensor, value: Tensor, bias: PositionBias | None
    ) -> Tensor:
        """With products of whole numbers and portable softmax."""
        columns = 1
        if bias is not None:
            # Kept: to make digits of tables asks for numbers.
            given, columns = bias, bias.columns
            bias = self._bias.get(lambda: given, bias.tensors, bias.key)
        logits_of, values_of = self._products_worth(query.shape[-1])
        query = self.query_quantizer(query, steps=True)
        key = self.key_quantizer(key, steps=True)
        value = values_of.operand(self.value_quantizer(value, steps=True))
        result = query.new_empty(*query.shape[:3], value.shape[-1])
        for head, first, last in softmax_pieces(query, key, columns):
            tokens = slice(first * columns, last * columns)
            part = query[:, head, tokens]
            terms = None
            if bias is not None:
                step = by_head(self.query_quantizer.step, head)
                largest = self.query_quantizer.grid.largest_step
                terms = bias.of_steps(part, step, largest, head, first, last)
            worth = logits_of.of_heads(head)
            logits: Tensor = self.query_key(part, key[:, head], worth, terms)
            attention = self.softmax_quantizer(portable_softmax(logits), steps=True)
            worth = values_of.of_heads(head)
            result[:, head, tokens] = self.attention_value(attention, value[:, head], worth)
        return result

    def _products_worth(self, head_dim: int) -> tuple[Whole, Whole]:
        """Worths of both products, made once: those of values ask for a number."""
        query, key = self.query_quantizer, self.key_quantizer
        softmax, value = self.softmax_quantizer, self.value_quantizer
        exact = self.arithmetic is Arithmetic.INTEGER

        def make() -> tuple[Whole, Whole]:
            logits = logits_worth(query, key, self.scale, head_dim)
            values = values_worth(softmax, value)
            return replace(logits, integer=exact), replace(values, integer=exact)

        four = (query, key, softmax, value)
        sources = [tensor for quantizer in four for tensor in quantizer.tensors]
        return self._worths.get(make, sources, head_dim, exact)


def portable_softmax(logits: Tensor) -> Tensor:
    """Softmax over the last axis of float32 logits."""
    rows = logits.reshape(-1, logits.shape[-1])
    return _softmax(rows, rows.amax(-1, keepdim=True)).reshape(logits.shape)


def _hard_logits(rows: Tensor, largest: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    rows = hard_numbers.numbers(hard_numbers.some_rows(rows)) * 0.125
    yield rows, rows.amax(-1, keepdim=True)


@unwatched()
@fused_exactly(_hard_logits)
def _softmax(rows: Tensor, largest: Tensor) -> Tensor:
    return portable.softmax_below(rows, largest)


@work(SoftmaxAttention, QuantizedSoftmaxAttention)
def _work(
    attention: SoftmaxAttention | QuantizedSoftmaxAttention,
    inputs: tuple[Any, ...],
    output: Tensor,
) -> Iterator[Work]:
    query, key, value, *others = inputs
    logits = query[..., 0].numel() * key.shape[2]
    windows = len(query) > 1
    read = ((QUERY, query.numel()), (KEY, key.numel()))
    yield Work("query_key", logits * query.shape[-1], (QUERY, KEY), read, windows)
    read = ((SOFTMAX, logits), (VALUE, value.numel()))
    yield Work("attention_value", logits * value.shape[-1], (SOFTMAX, VALUE), read, windows)
    for bias in filter(None, others):
        yield from bias.work(query)
