"""SAM's two attention blocks with quantizers on query, key, value and softmax output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptq4sam.quantization.quantizers import Mode, Quantizer
from ptq4sam.sam import image_encoder, transformer

# Bytes of softmax output computed at once where no observer must see it whole: a global attention
# at 1024 px is 805 MB for ViT-B, of which quantization needs several copies.
_SOFTMAX_BYTES = 128 * 2**20


@dataclass(frozen=True)
class AttentionQuantizers:
    """The four activation quantizers of an attention."""

    query: Quantizer
    key: Quantizer
    value: Quantizer
    softmax: Quantizer


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

    def _quantized_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Attend with quantized operands.

        Args:
            query: [batch, heads, n, head_dim] after projection, not yet scaled.
            key: [batch, heads, m, head_dim].
            value: [batch, heads, m, head_dim].
            bias: gives the logits to add for some heads of the quantized query.

        Returns:
            [batch, heads, n, head_dim].
        """
        query = self.query_quantizer(query)
        key = self.key_quantizer(key)
        value = self.value_quantizer(value)
        batch, heads, queries, _ = query.shape
        head_bytes = batch * queries * key.shape[2] * query.itemsize
        at_once = max(1, _SOFTMAX_BYTES // head_bytes)
        if torch.is_grad_enabled() or self.softmax_quantizer.mode is Mode.OBSERVE:
            at_once = heads
        pieces = []
        for first in range(0, heads, at_once):
            part = slice(first, first + at_once)
            logits = (query[:, part] * self.scale) @ key[:, part].transpose(-1, -2)
            if bias is not None:
                logits = logits + bias(query[:, part])
            attention = self.softmax_quantizer(logits.softmax(dim=-1), value[:, part])
            pieces.append(attention @ value[:, part])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


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
        attended = self._quantized_attention(
            query,
            key,
            value,
            (lambda part: self.position_bias(part, grid)) if self.use_rel_pos else None,
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
