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

from ptq4sam.sam.common import LayerNorm2d, MLPBlock
from ptq4sam.sam.stages import Stage, State, run_stages

# Bytes of attention bias that one call of scaled_dot_product_attention may be given. The whole bias
# of a global attention at 1024 px is 12 x 4096 x 4096 floats (805 MB); in pieces it costs nothing
# on a CPU. A GPU stands idle between pieces that are small.
_BIAS_BYTES = {"cpu": 32 * 2**20, "cuda": 2**30}


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
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.use_rel_pos = use_rel_pos
        if use_rel_pos:
            head_dim = dim // num_heads
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * input_size[0] - 1, head_dim))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * input_size[1] - 1, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        """Attend within each [rows, columns] grid of a [batch, rows, columns, dim] tensor."""
        rows, columns = x.shape[1:3]
        query, key, value = self.split_heads(self.qkv(x))
        attended = self._attend(query, key, value, (rows, columns))
        projected: Tensor = self.proj(self.merge_heads(attended, (rows, columns)))
        return projected

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

    def position_tables(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Relative positions of a (rows, columns) grid: see `relative_table`, of either axis."""
        rows, columns = grid
        return relative_table(self.rel_pos_h, rows), relative_table(self.rel_pos_w, columns)

    def position_bias(
        self,
        query: Tensor,
        tables: tuple[Tensor, Tensor],
        first_row: int = 0,
        last_row: int | None = None,
    ) -> Tensor:
        """Relative-position logits of some rows of queries (ViTDet, section 3).

        Args:
            query: [batch, heads, (last_row - first_row) * columns, head_dim], unscaled.
            tables: of the grid of keys.
            first_row: first query row.
            last_row: row after the last query row; None for all.

        Returns:
            [batch, heads, queries, rows * columns].
        """
        by_row, by_column = position_terms(query, tables, first_row, last_row)
        return joined_terms(by_row, by_column, query.shape[1])

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int]) -> Tensor:
        if not self.use_rel_pos:
            return F.scaled_dot_product_attention(query, key, value, scale=self.scale)
        rows, columns = grid
        row_bytes = query.shape[0] * self.num_heads * columns * rows * columns * query.itemsize
        allowed = _BIAS_BYTES.get(query.device.type, _BIAS_BYTES["cpu"])
        rows_at_once = max(1, min(rows, allowed // row_bytes))
        tables = self.position_tables(grid)
        # Written in place: results kept in a list would lie between the freed biases in memory.
        attended = torch.empty_like(query)
        for first in range(0, rows, rows_at_once):
            last = min(rows, first + rows_at_once)
            tokens = slice(first * columns, last * columns)
            part = query[:, :, tokens]
            bias = self.position_bias(part, tables, first, last)
            attended[:, :, tokens] = F.scaled_dot_product_attention(
                part, key, value, attn_mask=bias, scale=self.scale
            )
        return attended


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


def position_terms(
    query: Tensor, tables: tuple[Tensor, Tensor], first_row: int = 0, last_row: int | None = None
) -> tuple[Tensor, Tensor]:
    """What relative positions of each axis add to logits; arguments as for `position_bias`.

    Returns:
        [batch * heads, query rows, columns, rows] and [batch * heads, query rows, columns,
        columns].
    """
    table_h, table_w = tables
    columns, head_dim = len(table_w), query.shape[-1]
    grid_query = query.reshape(-1, query.shape[2] // columns, columns, head_dim)
    by_row = torch.einsum("brcd,rkd->brck", grid_query, table_h[first_row:last_row])
    by_column = torch.einsum("brcd,ckd->brck", grid_query, table_w)
    return by_row, by_column


def joined_terms(by_row: Tensor, by_column: Tensor, heads: int) -> Tensor:
    """The sum of the terms of both axes: [batch, heads, queries, rows * columns]."""
    rows, columns = by_row.shape[-1], by_column.shape[-1]
    # Contiguous terms make a contiguous sum, which the reshape need not copy.
    bias = by_row.contiguous()[..., :, None] + by_column.contiguous()[..., None, :]
    return bias.reshape(len(by_row) // heads, heads, -1, rows * columns)


def relative_table(table: Tensor, size: int) -> Tensor:
    """Rows of a relative-position table for every query and key position of one axis.

    Args:
        table: [2 * table_size - 1, head_dim].
        size: number of positions; a table made for another size is interpolated linearly.

    Returns:
        [size queries, size keys, head_dim].
    """
    table = table_of_size(table, size)
    return table[relative_rows(size, table.device)]


def table_of_size(table: Tensor, size: int) -> Tensor:
    """A relative-position table for `size` positions, interpolated where it is another's.

    Returns:
        [2 * size - 1, head_dim].
    """
    wanted = 2 * size - 1
    if table.shape[0] == wanted:
        return table
    resized = F.interpolate(table.t()[None], size=wanted, mode="linear")
    return resized[0].t()


def relative_rows(size: int, device: torch.device | str = "cpu") -> Tensor:
    """Which row of the table belongs to each query and key position: [size queries, size keys]."""
    position = torch.arange(size, device=device)
    return position[:, None] - position[None, :] + size - 1


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
