"""The two-way transformer of SAM's mask decoder (Kirillov et al., 2023, figure 14)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from ptq4sam.operators.attention import SoftmaxAttention
from ptq4sam.sam.common import MLPBlock
from ptq4sam.sam.stages import Stage, State, run_stages


class Attention(nn.Module):
    """Multi-head attention whose internal width may be smaller than the embedding's."""

    def __init__(self, embedding_dim: int, num_heads: int, downsample_rate: int = 1) -> None:
        super().__init__()
        internal_dim = embedding_dim // downsample_rate
        self.num_heads = num_heads
        self.q_proj = nn.Linear(embedding_dim, internal_dim)
        self.k_proj = nn.Linear(embedding_dim, internal_dim)
        self.v_proj = nn.Linear(embedding_dim, internal_dim)
        self.out_proj = nn.Linear(internal_dim, embedding_dim)
        self.core = SoftmaxAttention((internal_dim // num_heads) ** -0.5)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from q [batch, n, dim] to k, v [batch, m, dim]; the result is as q."""
        query = self.split_heads(self.q_proj(q))
        key = self.split_heads(self.k_proj(k))
        value = self.split_heads(self.v_proj(v))
        attended = self.core(query, key, value)
        projected: Tensor = self.out_proj(self.merge_heads(attended))
        return projected

    def split_heads(self, x: Tensor) -> Tensor:
        """[batch, tokens, internal_dim] to [batch, heads, tokens, head_dim]."""
        batch, tokens, _ = x.shape
        return x.reshape(batch, tokens, self.num_heads, -1).transpose(1, 2)

    def merge_heads(self, x: Tensor) -> Tensor:
        """[batch, heads, tokens, head_dim] to [batch, tokens, internal_dim]."""
        return x.transpose(1, 2).flatten(2)


class TwoWayState(NamedTuple):
    """What flows between the units of the transformer.

    Attributes:
        queries: tokens [batch, n, dim].
        keys: the image [batch, m, dim].
        query_pe: positions of the tokens.
        key_pe: positions of the image.
    """

    queries: Tensor
    keys: Tensor
    query_pe: Tensor
    key_pe: Tensor


class TwoWayAttentionBlock(nn.Module):
    """Self-attention of tokens, tokens to image, MLP on tokens, image to tokens."""

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int,
        mlp_dim: int,
        attention_downsample_rate: int,
        skip_first_layer_pe: bool,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.self_attn = Attention(embedding_dim, num_heads)
        self.norm1 = nn.LayerNorm(embedding_dim, norm_eps)
        self.cross_attn_token_to_image = Attention(
            embedding_dim, num_heads, attention_downsample_rate
        )
        self.norm2 = nn.LayerNorm(embedding_dim, norm_eps)
        self.mlp = MLPBlock(embedding_dim, mlp_dim, nn.ReLU)
        self.norm3 = nn.LayerNorm(embedding_dim, norm_eps)
        self.norm4 = nn.LayerNorm(embedding_dim, norm_eps)
        self.cross_attn_image_to_token = Attention(
            embedding_dim, num_heads, attention_downsample_rate
        )
        self.skip_first_layer_pe = skip_first_layer_pe

    def stages(self, *, joint: bool = False) -> list[Stage]:
        """The block's units; the state is a TwoWayState.

        Args:
            joint: both cross attentions are one unit, with what lies between them.
        """
        units = self._units()
        if not joint:
            return units
        together = CrossAttentions(self, units[1:])
        return [units[0], Stage("cross_attentions", together, tuple, together.leave)]

    def _units(self) -> list[Stage]:
        return [
            Stage("self_attn", self.self_attn, self._enter_self, self._leave_self),
            Stage(
                "cross_attn_token_to_image",
                self.cross_attn_token_to_image,
                enter_token_to_image,
                self._leave_token_to_image,
            ),
            Stage("mlp", self.mlp, self._enter_mlp, self._leave_mlp),
            Stage(
                "cross_attn_image_to_token",
                self.cross_attn_image_to_token,
                self._enter_image_to_token,
                self._leave_image_to_token,
            ),
        ]

    def _enter_self(self, state: State) -> tuple[Tensor, ...]:
        s = TwoWayState(*state)
        if self.skip_first_layer_pe:
            return s.queries, s.queries, s.queries
        placed = s.queries + s.query_pe
        return placed, placed, s.queries

    def _leave_self(self, state: State, attended: Tensor) -> State:
        s = TwoWayState(*state)
        # The first layer's tokens are their own positions: there is nothing to add to.
        queries = attended if self.skip_first_layer_pe else s.queries + attended
        return s._replace(queries=self.norm1(queries))

    def _leave_token_to_image(self, state: State, attended: Tensor) -> State:
        s = TwoWayState(*state)
        return s._replace(queries=self.norm2(s.queries + attended))

    def _enter_mlp(self, state: State) -> tuple[Tensor, ...]:
        return (TwoWayState(*state).queries,)

    def _leave_mlp(self, state: State, changed: Tensor) -> State:
        s = TwoWayState(*state)
        return s._replace(queries=self.norm3(s.queries + changed))

    def _enter_image_to_token(self, state: State) -> tuple[Tensor, ...]:
        s = TwoWayState(*state)
        return s.keys + s.key_pe, s.queries + s.query_pe, s.queries

    def _leave_image_to_token(self, state: State, attended: Tensor) -> State:
        s = TwoWayState(*state)
        return s._replace(keys=self.norm4(s.keys + attended))


class CrossAttentions(nn.Module):
    """Both cross attentions of a block and the MLP between them as one unit.

    What it answers with are both sides behind it, tokens and image, one after the other: an error
    of it is the sum of theirs (joint reconstruction of CAR-SAM, CVPR 2026).

    Args:
        block: whose they are.
        stages: them, with the arithmetic around.
    """

    _NAMES = (
        "cross_attn_token_to_image",
        "norm2",
        "mlp",
        "norm3",
        "cross_attn_image_to_token",
        "norm4",
    )

    def __init__(self, block: TwoWayAttentionBlock, stages: Sequence[Stage]) -> None:
        super().__init__()
        for name in self._NAMES:
            self.add_module(name, block.get_submodule(name))
        self._stages = tuple(stages)

    def forward(self, queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor) -> Tensor:
        """Run them; [batch, n + m, dim]."""
        state = run_stages(self._stages, TwoWayState(queries, keys, query_pe, key_pe))
        behind = TwoWayState(*state)
        return torch.cat([behind.queries, behind.keys], dim=1)

    def leave(self, state: State, answer: Tensor) -> State:
        """The state behind it."""
        s = TwoWayState(*state)
        tokens = s.queries.shape[1]
        return s._replace(queries=answer[:, :tokens], keys=answer[:, tokens:])


def enter_token_to_image(state: State) -> tuple[Tensor, ...]:
    """Arguments of an attention from tokens to the image."""
    s = TwoWayState(*state)
    return s.queries + s.query_pe, s.keys + s.key_pe, s.keys


class TwoWayTransformer(nn.Module):
    """Let prompt tokens and the image embedding attend to each other."""

    def __init__(
        self,
        depth: int,
        embedding_dim: int,
        num_heads: int,
        mlp_dim: int,
        attention_downsample_rate: int = 2,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TwoWayAttentionBlock(
                embedding_dim,
                num_heads,
                mlp_dim,
                attention_downsample_rate,
                skip_first_layer_pe=index == 0,
                norm_eps=norm_eps,
            )
            for index in range(depth)
        )
        self.final_attn_token_to_image = Attention(
            embedding_dim, num_heads, attention_downsample_rate
        )
        self.norm_final_attn = nn.LayerNorm(embedding_dim, norm_eps)

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
        behind = TwoWayState(*run_stages(self.stages(), state))
        return behind.queries, behind.keys

    def begin(self, image_embedding: Tensor, image_pe: Tensor, point_embedding: Tensor) -> State:
        """The state before the first stage; arguments as for `forward`."""
        keys = image_embedding.flatten(2).transpose(1, 2)
        key_pe = image_pe.flatten(2).transpose(1, 2)
        return TwoWayState(point_embedding, keys, point_embedding, key_pe)

    def stages(self, *, joint: bool = False) -> list[Stage]:
        """The blocks' stages and the last attention; the state is a TwoWayState.

        Args:
            joint: see TwoWayAttentionBlock.stages.
        """
        layers = [
            stage.below(f"layers.{index}")
            for index, layer in enumerate(self.layers)
            for stage in cast(TwoWayAttentionBlock, layer).stages(joint=joint)
        ]
        final = Stage(
            "final_attn_token_to_image",
            self.final_attn_token_to_image,
            enter_token_to_image,
            self._leave_final,
        )
        return [*layers, final]

    def _leave_final(self, state: State, attended: Tensor) -> State:
        s = TwoWayState(*state)
        return s._replace(queries=self.norm_final_attn(s.queries + attended))
