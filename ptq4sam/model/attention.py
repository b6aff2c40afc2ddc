"""SAM's two attention blocks with quantizers on query, key, value and softmax output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptq4sam.quantization.quantizers import Mode, Quantizer
from ptq4sam.sam import image_encoder, transformer

# Bytes of softmax output computed at once where nothing must see it whole: a global attention at
# 1024 px is 805 MB for ViT-B, of which quantization needs several copies. A CPU's pieces stay in
# its cache.
_SOFTMAX_BYTES = {"cpu": 16 * 2**20, "cuda": 256 * 2**20}

Bias = Callable[[Tensor, int, int], Tensor]
"""Logits to add for the grid rows first to last of some heads of the quantized query."""


@dataclass(frozen=True)
class AttentionQuantizers:
    """The four activation quantizers of an attention."""

    query: Quantizer
    key: Quantizer
    value: Quantizer
    softmax: Quantizer


class QueryKeyProduct(nn.Module):
    """Logits of queries [..., n, head_dim] and keys [..., m, head_dim]: [..., n, m].

    A module, as the other product, so that hooks see the operands of both.
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """Scale the query, then multiply."""
        return (query * self.scale) @ key.transpose(-1, -2)


class AttentionValueProduct(nn.Module):
    """Attention [..., n, m] times values [..., m, head_dim]: [..., n, head_dim]."""

    def forward(self, attention: Tensor, value: Tensor) -> Tensor:
        """Multiply."""
        return attention @ value


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

    def _quantized_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Bias | None = None,
        columns: int = 1,
    ) -> Tensor:
        """Attend with quantized operands.

        Args:
            query: [batch, heads, rows * columns, head_dim] after projection, not yet scaled.
            key: [batch, heads, m, head_dim].
            value: [batch, heads, m, head_dim].
            bias: gives the logits to add.
            columns: queries in a row of their grid.

        Returns:
            [batch, heads, rows * columns, head_dim].
        """
        query = self.query_quantizer(query)
        key = self.key_quantizer(key)
        value = self.value_quantizer(value)

        def attend(head: slice, first: int, last: int) -> Tensor:
            part = query[:, head, first * columns : last * columns]
            logits: Tensor = self.query_key(part, key[:, head])
            if bias is not None:
                logits.add_(bias(part, first, last))
            attention = self.softmax_quantizer(logits.softmax(dim=-1), value[:, head])
            attended: Tensor = self.attention_value(attention, value[:, head])
            return attended

        if torch.is_grad_enabled() or self.softmax_quantizer.mode is Mode.OBSERVE:
            return attend(slice(None), 0, query.shape[2] // columns)
        result = value.new_empty(*query.shape[:3], value.shape[-1])
        for head, first, last in softmax_pieces(query, key, columns):
            result[:, head, first * columns : last * columns] = attend(head, first, last)
        return result


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
        self._register(quantizers)

    def forward(self, x: Tensor) -> Tensor:
        """As the float block: [batch, rows, columns, dim] to the same shape."""
        grid = (x.shape[1], x.shape[2])
        query, key, value = self.split_heads(self.qkv(x))

        def bias(part: Tensor, first: int, last: int) -> Tensor:
            return self.position_bias(part, grid, first, last)

        attended = self._quantized_attention(
            query, key, value, bias if self.use_rel_pos else None, columns=grid[1]
        )
        projected: Tensor = self.proj(self.merge_heads(attended, grid))
        return projected


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
