"""The two-way transformer of SAM's mask decoder (Kirillov et al., 2023, figure 14)."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from ptq4sam.sam.common import MLPBlock
from ptq4sam.sam.stages import Stage, State, run_stages


class Attention(nn.Module):
    """Multi-head attention whose internal width may be smaller than the embedding's."""

    def __init__(self, embedding_dim: int, num_heads: int, downsample_rate: int = 1) -> None:
        super().__init__()
        internal_dim = embedding_dim // downsample_rate
        self.num_heads = num_heads
        self.scale = (internal_dim // num_heads) ** -0.5
        self.q_proj = nn.Linear(embedding_dim, internal_dim)
        self.k_proj = nn.Linear(embedding_dim, internal_dim)
        self.v_proj = nn.Linear(embedding_dim, internal_dim)
        self.out_proj = nn.Linear(internal_dim, embedding_dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from q [batch, n, dim] to k, v [batch, m, dim]; the result is as q."""
        query = self.split_heads(self.q_proj(q))
        key = self.split_heads(self.k_proj(k))
        value = self.split_heads(self.v_proj(v))
        attended = F.scaled_dot_product_attention(query, key, value, scale=self.scale)
        projected: Tensor = self.out_proj(self.merge_heads(attended))
        return projected

    def split_heads(self, x: Tensor) -> Tensor:
        """[batch, tokens, internal_dim] to [batch, heads, tokens, head_dim]."""
        batch, tokens, _ = x.shape
        return x.reshape(batch, tokens, self.num_heads, -1).transpose(1, 2)

    def merge_heads(self, x: Tensor) -> Tensor:
        """[batch, heads, tokens, head_dim] to [batch, tokens, internal_dim]."""
        return x.transpose(1, 2).flatten(2)


class TwoWayAttentionBlock(nn.Module):
    """Self-attention of tokens, tokens to image, MLP on tokens, image to tokens."""

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int,
        mlp_dim: int,
        attention_downsample_rate: int,
        skip_first_layer_pe: bool,
    ) -> None:
        super().__init__()
        self.self_attn = Attention(embedding_dim, num_heads)
        self.norm1 = nn.LayerNorm(embedding_dim)
        self.cross_attn_token_to_image = Attention(
            embedding_dim, num_heads, attention_downsample_rate
        )
        self.norm2 = nn.LayerNorm(embedding_dim)
        self.mlp = MLPBlock(embedding_dim, mlp_dim, nn.ReLU)
        self.norm3 = nn.LayerNorm(embedding_dim)
        self.norm4 = nn.LayerNorm(embedding_dim)
        self.cross_attn_image_to_token = Attention(
            embedding_dim, num_heads, attention_downsample_rate
        )
        self.skip_first_layer_pe = skip_first_layer_pe

    def stages(self) -> list[Stage]:
        """The block's units; the state is (queries, keys, position of queries, of keys).

        Queries are the tokens [batch, n, dim], keys the image [batch, m, dim].
        """
        return [
            Stage("self_attn", self.self_attn, self._enter_self, self._leave_self),
            Stage(
                "cross_attn_token_to_image",
                self.cross_attn_token_to_image,
                to_image,
                lambda s, attended: (self.norm2(s[0] + attended), *s[1:]),
            ),
            Stage(
                "mlp",
                self.mlp,
                lambda s: (s[0],),
                lambda s, changed: (self.norm3(s[0] + changed), *s[1:]),
            ),
            Stage(
                "cross_attn_image_to_token",
                self.cross_attn_image_to_token,
                lambda s: (s[1] + s[3], s[0] + s[2], s[0]),
                lambda s, attended: (s[0], self.norm4(s[1] + attended), *s[2:]),
            ),
        ]

    def _enter_self(self, state: State) -> tuple[Tensor, ...]:
        queries, _, query_pe, _ = state
        if self.skip_first_layer_pe:
            return queries, queries, queries
        placed = queries + query_pe
        return placed, placed, queries

    def _leave_self(self, state: State, attended: Tensor) -> State:
        # The first layer's tokens are their own positions: there is nothing to add to.
        queries = attended if self.skip_first_layer_pe else state[0] + attended
        return (self.norm1(queries), *state[1:])


def to_image(state: State) -> tuple[Tensor, ...]:
    """Arguments of an attention from tokens to the image."""
    queries, keys, query_pe, key_pe = state
    return queries + query_pe, keys + key_pe, keys


class TwoWayTransformer(nn.Module):
    """Let prompt tokens and the image embedding attend to each other."""

    def __init__(
        self,
        depth: int,
        embedding_dim: int,
        num_heads: int,
        mlp_dim: int,
        attention_downsample_rate: int = 2,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TwoWayAttentionBlock(
                embedding_dim,
                num_heads,
                mlp_dim,
                attention_downsample_rate,
                skip_first_layer_pe=index == 0,
            )
            for index in range(depth)
        )
        self.final_attn_token_to_image = Attention(
            embedding_dim, num_heads, attention_downsample_rate
        )
        self.norm_final_attn = nn.LayerNorm(embedding_dim)

    def forward(
        self, image_embedding: Tensor, image_pe: Tensor, point_embedding: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Attend both ways.

        Args:
            image_embedding: [batch, dim, rows, columns].
            image_pe: position encoding, as image_embedding.
            point_embedding: [batch, n, dim].

        Returns:
            Tokens [batch, n, dim] and image [batch, rows * columns, dim].
        """
        state = self.begin(image_embedding, image_pe, point_embedding)
        queries, keys, *_ = run_stages(self.stages(), state)
        return queries, keys

    def begin(self, image_embedding: Tensor, image_pe: Tensor, point_embedding: Tensor) -> State:
        """The state before the first stage; arguments as for `forward`."""
        keys = image_embedding.flatten(2).transpose(1, 2)
        key_pe = image_pe.flatten(2).transpose(1, 2)
        return point_embedding, keys, point_embedding, key_pe

    def stages(self) -> list[Stage]:
        """The blocks' stages and the last attention; the state is as for a block's."""
        layers = [
            stage.below(f"layers.{index}")
            for index, layer in enumerate(self.layers)
            for stage in cast(TwoWayAttentionBlock, layer).stages()
        ]
        final = Stage(
            "final_attn_token_to_image",
            self.final_attn_token_to_image,
            to_image,
            lambda s, attended: (self.norm_final_attn(s[0] + attended), *s[1:]),
        )
        return [*layers, final]
