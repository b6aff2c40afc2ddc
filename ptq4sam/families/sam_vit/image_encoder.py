"""SAM's image encoder: a ViT with windowed attention and decomposed relative positions.

Follows Kirillov et al., "Segment Anything" (2023) and Li et al., "Exploring Plain Vision
Transformer Backbones for Object Detection" (ViTDet, 2022). Parameter names are the official ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq4sam.operators.attention import SoftmaxAttention
from ptq4sam.operators.bias import RelativePositions
from ptq4sam.operators.norm import LayerNorm2d
from ptq4sam.sam.common import MLPBlock
from ptq4sam.sam.stages import Stage, State, run_stages


class PatchEmbed(nn.Module):
    """Cut an image into patches and project each."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, in_chans, height, width] to [batch, rows, columns, embed_dim]."""
        patches: Tensor = self.proj(x)
        return patches.permute(0, 2, 3, 1)


class Attention(nn.Module):
    """Multi-head self-attention over a grid, with decomposed relative positions."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool,
        use_rel_pos: bool,
        input_size: tuple[int, int],
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.use_rel_pos = use_rel_pos
        if use_rel_pos:
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * input_size[0] - 1, head_dim))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * input_size[1] - 1, head_dim))
        self.core = SoftmaxAttention(head_dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within each [rows, columns] grid of a [batch, rows, columns, dim] tensor."""
        grid = (x.shape[1], x.shape[2])
        query, key, value = self.split_heads(self.qkv(x))
        attended = self.core(query, key, value, self.positions(grid))
        projected: Tensor = self.proj(self.merge_heads(attended, grid))
        return projected

    def positions(self, grid: tuple[int, int]) -> RelativePositions | None:
        """What positions in a grid of so many rows and columns add to logits; None without."""
        if not self.use_rel_pos:
            return None
        return RelativePositions(self.rel_pos_h, self.rel_pos_w, grid)

    def split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split [batch, rows, columns, 3*dim] into three [batch, heads, tokens, head_dim]."""
        batch, rows, columns, _ = qkv.shape
        qkv = qkv.reshape(batch, rows * columns, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        return query, key, value

    def merge_heads(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Join [batch, heads, tokens, head_dim] to [batch, rows, columns, dim]."""
        batch = x.shape[0]
        return x.transpose(1, 2).reshape(batch, grid[0], grid[1], -1)


class Block(nn.Module):
    """Transformer block with window attention (window_size > 0) or global attention (0)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        use_rel_pos: bool,
        window_size: int,
        input_size: tuple[int, int],
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        attention_size = (window_size, window_size) if window_size else input_size
        self.attn = Attention(dim, num_heads, qkv_bias, use_rel_pos, attention_size)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLPBlock(dim, int(dim * mlp_ratio))
        self.window_size = window_size

    def stages(self) -> list[Stage]:
        """Attention, then MLP; the state is ([batch, rows, columns, dim],)."""
        return [
            Stage("attn", self.attn, self._enter_attention, self._leave_attention),
            Stage("mlp", self.mlp, self._enter_mlp, self._leave_mlp),
        ]

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, rows, columns, dim] to the same shape."""
        return run_stages(self.stages(), (x,))[0]

    def _enter_attention(self, state: State) -> tuple[Tensor, ...]:
        x = self.norm1(state[0])
        return (window_partition(x, self.window_size) if self.window_size else x,)

    def _leave_attention(self, state: State, attended: Tensor) -> State:
        (x,) = state
        if self.window_size:
            attended = window_unpartition(attended, self.window_size, x.shape)
        return (x + attended,)

    def _enter_mlp(self, state: State) -> tuple[Tensor, ...]:
        return (self.norm2(state[0]),)

    def _leave_mlp(self, state: State, changed: Tensor) -> State:
        return (state[0] + changed,)


class ImageEncoderViT(nn.Module):
    """SAM's image encoder: [batch, 3, img_size, img_size] to [batch, out_chans, grid, grid]."""

    def __init__(
        self,
        img_size: int = 1024,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        out_chans: int = 256,
        qkv_bias: bool = True,
        use_abs_pos: bool = True,
        use_rel_pos: bool = True,
        window_size: int = 14,
        global_attn_indexes: Sequence[int] = (2, 5, 8, 11),
    ) -> None:
        super().__init__()
        self.img_size = img_size
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        grid = img_size // patch_size
        self.pos_embed: nn.Parameter | None = (
            nn.Parameter(torch.zeros(1, grid, grid, embed_dim)) if use_abs_pos else None
        )
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio,
                qkv_bias,
                use_rel_pos,
                window_size=0 if index in global_attn_indexes else window_size,
                input_size=(grid, grid),
            )
            for index in range(depth)
        )
        self.neck = nn.Sequential(
            nn.Conv2d(embed_dim, out_chans, kernel_size=1, bias=False),
            LayerNorm2d(out_chans),
            nn.Conv2d(out_chans, out_chans, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(out_chans),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Embed normalised, padded images; see the class for shapes."""
        return run_stages(self.stages(), self.begin(x))[0]

    def begin(self, x: Tensor) -> State:
        """The state before the first stage, from images."""
        x = self.patch_embed(x)
        return (x if self.pos_embed is None else x + self.pos_embed,)

    def stages(self) -> list[Stage]:
        """The blocks' stages and the neck; the state behind it is the embedding."""
        blocks = [
            stage.below(f"blocks.{index}")
            for index, block in enumerate(self.blocks)
            for stage in cast(Block, block).stages()
        ]
        neck = Stage("neck", self.neck, _channels_first, lambda _state, embedding: (embedding,))
        return [*blocks, neck]


def _channels_first(state: State) -> tuple[Tensor, ...]:
    return (state[0].permute(0, 3, 1, 2),)


def window_partition(x: Tensor, window_size: int) -> Tensor:
    """Cut [batch, rows, columns, dim] into windows, padding with zeros.

    Returns:
        [batch * windows, window_size, window_size, dim].
    """
    batch, rows, columns, dim = x.shape
    pad_rows, pad_columns = -rows % window_size, -columns % window_size
    if pad_rows or pad_columns:
        x = F.pad(x, (0, 0, 0, pad_columns, 0, pad_rows))
    rows, columns = rows + pad_rows, columns + pad_columns
    x = x.view(
        batch, rows // window_size, window_size, columns // window_size, window_size, dim
    ).transpose(2, 3)
    return x.reshape(-1, window_size, window_size, dim)


def window_unpartition(windows: Tensor, window_size: int, shape: Sequence[int]) -> Tensor:
    """Undo `window_partition`; `shape` is the original [batch, rows, columns, dim]."""
    batch, rows, columns, dim = shape
    down, across = -(-rows // window_size), -(-columns // window_size)
    x = windows.view(batch, down, across, window_size, window_size, dim).transpose(2, 3)
    x = x.reshape(batch, down * window_size, across * window_size, dim)
    return x[:, :rows, :columns].contiguous()
