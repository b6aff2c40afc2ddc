"""SAM's two attention blocks with quantizers on query, key, value and softmax output."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptq4sam.methods.granularity_table import LARGEST_ROW
from ptq4sam.model.layers import computes_whole
from ptq4sam.model.portable_layers import portable_softmax
from ptq4sam.model.relative_positions import RelativePositions
from ptq4sam.quantization.memo import Memo
from ptq4sam.quantization.quantizers import Mode, Quantizer
from ptq4sam.quantization.whole import operand, whole_product
from ptq4sam.sam import image_encoder, transformer

# Bytes of softmax output computed at once where nothing must see it whole: a global attention at
# 1024 px is 805 MB for ViT-B, of which quantization needs several copies. A CPU's pieces stay in
# its cache.
_SOFTMAX_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}


@dataclass(frozen=True)
class AttentionQuantizers:
    """The four activation quantizers of an attention."""

    query: Quantizer
    key: Quantizer
    value: Quantizer
    softmax: Quantizer


@dataclass(frozen=True)
class Whole:
    """What a product of steps is worth.

    Attributes:
        step: [] float32, worth of a product of 1.
        largest: what no partial sum exceeds.
    """

    step: Tensor
    largest: float

    def operand(self, x: Tensor) -> Tensor:
        """`x` as the product takes it, to be made once where it is multiplied in pieces."""
        return operand(x, self.largest)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """The product of a [..., n, K] and b [..., K, m], both in steps, in float32."""
        return whole_product(a, b, self.largest).mul_(self.step)


def logits_worth(query: Quantizer, key: Quantizer, scale: float, terms: int) -> Whole:
    """Worth of the product of query and key steps, with the attention's scale.

    Args:
        query: the quantizer of the query.
        key: the quantizer of the key.
        scale: of the attention.
        terms: head_dim.
    """
    largest = float(terms) * query.grid.largest_step * key.grid.largest_step
    return Whole(query.step * (key.step * scale), largest)


def values_worth(softmax: Quantizer, value: Quantizer) -> Whole:
    """Worth of the product of softmax and value steps, for any number of keys."""
    row = LARGEST_ROW / float(softmax.step)
    return Whole(softmax.step * value.step, row * value.grid.largest_step)


class QueryKeyProduct(nn.Module):
    """Logits of queries [..., n, head_dim] and keys [..., m, head_dim]: [..., n, m].

    A module, as the other product, so that hooks see the operands of both.
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, query: Tensor, key: Tensor, whole: Whole | None = None) -> Tensor:
        """Scale the query, then multiply; of steps, multiply, then scale."""
        if whole is None:
            return (query * self.scale) @ key.transpose(-1, -2)
        return whole.product(query, key.transpose(-1, -2))


class AttentionValueProduct(nn.Module):
    """Attention [..., n, m] times values [..., m, head_dim]: [..., n, head_dim]."""

    def forward(self, attention: Tensor, value: Tensor, whole: Whole | None = None) -> Tensor:
        """Multiply."""
        return attention @ value if whole is None else whole.product(attention, value)


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


class _QuantizedAttentionMixin(nn.Module):
    """Softmax attention in the open, so that its parts can be quantized."""

    query_quantizer: Quantizer
    key_quantizer: Quantizer
    value_quantizer: Quantizer
    softmax_quantizer: Quantizer
    scale: float

    def _register(self, quantizers: AttentionQuantizers) -> None:
        self.query_quantizer = quantizers.query
        self.key_quantizer = quantizers.key
        self.value_quantizer = quantizers.value
        self.softmax_quantizer = quantizers.softmax
        self.query_key = QueryKeyProduct(self.scale)
        self.attention_value = AttentionValueProduct()
        self._worths: Memo[tuple[Whole, Whole]] = Memo()

    def _quantized_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: RelativePositions | None = None,
        columns: int = 1,
    ) -> Tensor:
        """Attend with quantized operands.

        Args:
            query: [batch, heads, rows * columns, head_dim] after projection, not yet scaled.
            key: [batch, heads, m, head_dim].
            value: [batch, heads, m, head_dim].
            positions: give logits to add.
            columns: queries in a row of their grid.

        Returns:
            [batch, heads, rows * columns, head_dim].
        """
        three = self.query_quantizer, self.key_quantizer, self.value_quantizer
        if computes_whole(query, *three, self.softmax_quantizer):
            return self._whole_attention(query, key, value, positions, columns)
        self._worths.clear()
        query = self.query_quantizer(query)
        key = self.key_quantizer(key)
        value = self.value_quantizer(value)

        def attend(head: slice, first: int, last: int) -> Tensor:
            part = query[:, head, first * columns : last * columns]
            logits: Tensor = self.query_key(part, key[:, head])
            if positions is not None:
                logits.add_(positions.of_query(part, first, last))
            attention = self.softmax_quantizer(logits.softmax(dim=-1), value[:, head])
            attended: Tensor = self.attention_value(attention, value[:, head])
            return attended

        if torch.is_grad_enabled() or self.softmax_quantizer.mode is Mode.OBSERVE:
            return attend(slice(None), 0, query.shape[2] // columns)
        result = value.new_empty(*query.shape[:3], value.shape[-1])
        for head, first, last in softmax_pieces(query, key, columns):
            result[:, head, first * columns : last * columns] = attend(head, first, last)
        return result

    def _whole_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: RelativePositions | None,
        columns: int,
    ) -> Tensor:
        """As `_quantized_attention`, with products of whole numbers and portable softmax."""
        logits_of, values_of = self._products_worth(query.shape[-1])
        query = self.query_quantizer(query, steps=True)
        key = self.key_quantizer(key, steps=True)
        value = values_of.operand(self.value_quantizer(value, steps=True))
        result = query.new_empty(*query.shape[:3], value.shape[-1])
        for head, first, last in softmax_pieces(query, key, columns):
            tokens = slice(first * columns, last * columns)
            part = query[:, head, tokens]
            logits: Tensor = self.query_key(part, key[:, head], logits_of)
            if positions is not None:
                step = self.query_quantizer.step
                largest = self.query_quantizer.grid.largest_step
                logits.add_(positions.of_steps(part, step, largest, first, last))
            attention = self.softmax_quantizer(portable_softmax(logits), steps=True)
            result[:, head, tokens] = self.attention_value(attention, value[:, head], values_of)
        return result

    def _products_worth(self, head_dim: int) -> tuple[Whole, Whole]:
        """Worths of both products, made once: those of values ask for a number."""
        query, key = self.query_quantizer, self.key_quantizer
        softmax, value = self.softmax_quantizer, self.value_quantizer

        def make() -> tuple[Whole, Whole]:
            logits = logits_worth(query, key, self.scale, head_dim)
            return logits, values_worth(softmax, value)

        four = (query, key, softmax, value)
        sources = [tensor for quantizer in four for tensor in quantizer.tensors]
        return self._worths.get(make, sources, head_dim)


def positions_of(
    attention: image_encoder.Attention, grid: tuple[int, int]
) -> RelativePositions | None:
    """The relative positions of an attention to a grid of keys; None without."""
    return RelativePositions(attention, grid) if attention.use_rel_pos else None


class QuantizedEncoderAttention(image_encoder.Attention, _QuantizedAttentionMixin):
    """The image encoder's attention; relative positions are applied to the quantized query."""

    def __init__(
        self,
        source: image_encoder.Attention,
        qkv: nn.Linear,
        proj: nn.Linear,
        quantizers: AttentionQuantizers,
    ) -> None:
        nn.Module.__init__(self)
        self.num_heads, self.scale = source.num_heads, source.scale
        self.use_rel_pos = source.use_rel_pos
        if source.use_rel_pos:
            self.rel_pos_h, self.rel_pos_w = source.rel_pos_h, source.rel_pos_w
        self.qkv, self.proj = qkv, proj
        self._positions: Memo[RelativePositions] = Memo()
        self._register(quantizers)

    def forward(self, x: Tensor) -> Tensor:
        """As the float block: [batch, rows, columns, dim] to the same shape."""
        grid = (x.shape[1], x.shape[2])
        query, key, value = self.split_heads(self.qkv(x))

        attended = self._quantized_attention(
            query, key, value, self._relative_positions(grid), columns=grid[1]
        )
        projected: Tensor = self.proj(self.merge_heads(attended, grid))
        return projected

    def _relative_positions(self, grid: tuple[int, int]) -> RelativePositions | None:
        """Kept where nothing is learned: to make digits of them asks for numbers."""
        if torch.is_grad_enabled() or not self.use_rel_pos:
            return positions_of(self, grid)
        tables = self.rel_pos_h, self.rel_pos_w
        return self._positions.get(lambda: RelativePositions(self, grid), tables, grid)


class QuantizedDecoderAttention(transformer.Attention, _QuantizedAttentionMixin):
    """The mask decoder's attention."""

    def __init__(
        self,
        source: transformer.Attention,
        projections: dict[str, nn.Module],
        quantizers: AttentionQuantizers,
    ) -> None:
        nn.Module.__init__(self)
        self.num_heads, self.scale = source.num_heads, source.scale
        for name, projection in projections.items():
            setattr(self, name, projection)
        self._register(quantizers)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As the float block: q [batch, n, dim], k and v [batch, m, dim] to [batch, n, dim]."""
        query = self.split_heads(self.q_proj(q))
        key = self.split_heads(self.k_proj(k))
        value = self.split_heads(self.v_proj(v))
        attended = self._quantized_attention(query, key, value)
        projected: Tensor = self.out_proj(self.merge_heads(attended))
        return projected
