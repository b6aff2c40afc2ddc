"""What the two deformable transformers have in common: layers, positions, proposals, boxes.

Pictures of a batch have one size and no padding, as everywhere in inference of one picture at a
time; so there are no masks. Parameters have the names of Deformable DETR's code, which those of
H-Deformable-DETR and DINO go back to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ptq4sam.prompts.detr.attention import DeformableAttention, Shapes

_SMALLEST_PROPOSAL = 0.05
_BORDER = 0.01


class Mlp(nn.Module):
    """Linear layers with ReLU between them; [..., sizes[0]] to [..., sizes[-1]]."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers."""
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        last: Tensor = self.layers[-1](x)
        return last


class EncoderLayer(nn.Module):
    """Deformable attention among the cells of all levels, then a feed-forward network."""

    def __init__(self, dim: int, ffn: int, levels: int, heads: int, points: int) -> None:
        super().__init__()
        self.self_attn = DeformableAttention(dim, levels, heads, points)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, ffn)
        self.linear2 = nn.Linear(ffn, dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, positions: Tensor, centres: Tensor, shapes: Shapes) -> Tensor:
        """Cells [batch, n, dim] to cells; positions [n, dim], centres x, y in 0-1 [1, n, 2]."""
        centres = centres.expand(len(x), -1, -1)
        x = self.norm1(x + self.self_attn(x + positions, centres, x, shapes))
        out: Tensor = self.norm2(x + self.linear2(self.linear1(x).relu()))
        return out


class DecoderLayer(nn.Module):
    """Attention among queries, deformable attention to the picture, a feed-forward network."""

    def __init__(self, dim: int, ffn: int, levels: int, heads: int, points: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(dim)
        self.cross_attn = DeformableAttention(dim, levels, heads, points)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, ffn)
        self.linear2 = nn.Linear(ffn, dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(
        self, x: Tensor, positions: Tensor, boxes: Tensor, memory: Tensor, shapes: Shapes
    ) -> Tensor:
        """Queries to queries.

        Args:
            x: [batch, queries, dim].
            positions: [batch, queries, dim].
            boxes: cx, cy, w, h in 0-1 [batch, queries, 4].
            memory: the encoder's cells [batch, n, dim].
            shapes: of the levels.
        """
        placed = x + positions
        x = self.norm2(x + self.self_attn(placed, placed, x, need_weights=False)[0])
        x = self.norm1(x + self.cross_attn(x + positions, boxes, memory, shapes))
        out: Tensor = self.norm3(x + self.linear2(self.linear1(x).relu()))
        return out


class Encoder(nn.Module):
    """Encoder layers, one after another."""

    def __init__(self, depth: int, dim: int, ffn: int, levels: int, heads: int, points: int):
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderLayer(dim, ffn, levels, heads, points) for _ in range(depth)
        )

    def forward(self, x: Tensor, positions: Tensor, shapes: Shapes) -> Tensor:
        """Cells [batch, n, dim] to cells; positions [n, dim]."""
        centres = cell_centres(shapes, x.device)[None]
        for layer in self.layers:
            x = layer(x, positions, centres, shapes)
        return x


class InputProjection(nn.ModuleList):
    """Brings a backbone's levels to one width, and makes smaller ones of the last.

    Args:
        channels: of the backbone's levels.
        levels: how many there shall be.
        dim: channels of all of them.
    """

    def __init__(self, channels: Sequence[int], levels: int, dim: int) -> None:
        inputs = [channels[-1], *[dim] * levels][: levels - len(channels)]
        given = [nn.Conv2d(width, dim, 1) for width in channels]
        made = [nn.Conv2d(width, dim, 3, stride=2, padding=1) for width in inputs]
        super().__init__(nn.Sequential(conv, nn.GroupNorm(32, dim)) for conv in given + made)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Features [batch, channels, h, w] of each level to [batch, dim, h, w]."""
        maps = [project(x) for project, x in zip(self, features, strict=False)]
        for project in list(self)[len(features) :]:
            # The first of them starts from the backbone's own last level.
            last = features[-1] if len(maps) == len(features) else maps[-1]
            maps.append(project(last))
        return maps


def flatten(maps: Sequence[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
    """Cells of all levels [batch, n, dim], and each level's height and width."""
    cells = torch.cat([x.flatten(2).mT for x in maps], dim=1)
    return cells, [(x.shape[2], x.shape[3]) for x in maps]


def sines(values: Tensor, features: int, temperature: float) -> Tensor:
    """Sine and cosine in turn, at falling frequencies.

    Args:
        values: angles of the first frequency [..., k].
        features: numbers for each value.
        temperature: ratio of the first frequency to what the last one comes near to.

    Returns:
        [..., k * features].
    """
    exponents = 2 * (torch.arange(features, device=values.device) // 2) / features
    angles = values[..., None] / temperature**exponents
    pairs = torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], dim=-1)
    return pairs.flatten(-2).flatten(-2)


def cell_positions(
    shapes: Shapes, dim: int, temperature: float, offset: float, device: torch.device
) -> list[Tensor]:
    """Position embedding of the cells of each level, [h * w, dim]: of y, then of x.

    Args:
        shapes: height and width of each level.
        dim: channels.
        temperature: see `sines`.
        offset: what is taken off the cell's number, which counts from 1.
        device: where they shall be.
    """
    embedded = []
    for height, width in shapes:
        y, x = torch.meshgrid(
            *(torch.arange(1, n + 1, device=device) for n in (height, width)), indexing="ij"
        )
        sides = torch.tensor([height, width], device=device) + 1e-6
        angles = (torch.stack([y, x], -1) - offset) / sides * 2 * math.pi
        embedded.append(sines(angles.flatten(0, 1), dim // 2, temperature))
    return embedded


def encode(
    encoder: Encoder,
    maps: Sequence[Tensor],
    level_embed: Tensor,
    temperature: float,
    offset: float,
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Cells of all levels that know of each other.

    Args:
        encoder: lets them.
        maps: features [batch, dim, h, w] of each level.
        level_embed: tells the levels apart [levels, dim].
        temperature: see `sines`.
        offset: see `cell_positions`.

    Returns:
        [batch, n, dim], and each level's height and width.
    """
    cells, shapes = flatten(maps)
    embedded = cell_positions(shapes, cells.shape[-1], temperature, offset, cells.device)
    positions = torch.cat([cell + level for cell, level in zip(embedded, level_embed, strict=True)])
    memory: Tensor = encoder(cells, positions, shapes)
    return memory, shapes


def cell_centres(shapes: Shapes, device: torch.device) -> Tensor:
    """Centres x, y of the cells of all levels, in 0-1 of the picture [n, 2]."""
    centres = []
    for height, width in shapes:
        y, x = torch.meshgrid(
            *((torch.arange(n, device=device) + 0.5) / n for n in (height, width)), indexing="ij"
        )
        centres.append(torch.stack([x, y], -1).flatten(0, 1))
    return torch.cat(centres)


def proposals(shapes: Shapes, device: torch.device) -> tuple[Tensor, Tensor]:
    """A square box around each cell, larger with each level.

    Returns:
        Boxes before the sigmoid, cx, cy, w, h [n, 4], infinite where not usable; and which
        are usable [n, 1]: those whose numbers are all well inside of 0-1.
    """
    sizes = [
        torch.full((h * w, 2), _SMALLEST_PROPOSAL * 2**level, device=device)
        for level, (h, w) in enumerate(shapes)
    ]
    boxes = torch.cat([cell_centres(shapes, device), torch.cat(sizes)], dim=1)
    usable = ((boxes > _BORDER) & (boxes < 1 - _BORDER)).all(1, keepdim=True)
    return torch.log(boxes / (1 - boxes)).masked_fill(~usable, math.inf), usable


def pick(values: Tensor, places: Tensor) -> Tensor:
    """Rows of [batch, n, c] at places [batch, k]: [batch, k, c]."""
    return values.gather(1, places[..., None].expand(-1, -1, values.shape[-1]))


def first_stage(
    memory: Tensor,
    shapes: Shapes,
    read: Callable[[Tensor], Tensor],
    score: Callable[[Tensor], Tensor],
    head: Callable[[Tensor], Tensor],
    count: int,
) -> Tensor:
    """The best boxes that single cells propose (Zhu et al., 2021, two-stage Deformable DETR).

    Args:
        memory: the encoder's cells [batch, n, dim].
        shapes: of the levels.
        read: makes of the usable cells what the heads look at [batch, n, dim].
        score: how likely each of those is an object [batch, n].
        head: says how the boxes [batch, k, 4] of chosen cells [batch, k, dim] are to be moved.
        count: at most so many boxes.

    Returns:
        cx, cy, w, h in 0-1 [batch, k, 4].
    """
    logits, usable = proposals(shapes, memory.device)
    cells = read(memory * usable)
    scores = score(cells)
    places = scores.topk(min(count, scores.shape[1]), dim=1).indices
    return (head(pick(cells, places)) + logits[places]).sigmoid()


def refine(boxes: Tensor, delta: Tensor, epsilon: float) -> Tensor:
    """Move boxes in 0-1 by what a head says of them before the sigmoid; all [batch, q, 4].

    `epsilon` keeps the logarithms finite; the weights were learned with one of them.
    """
    boxes = boxes.clamp(0, 1)
    logits = torch.log(boxes.clamp(min=epsilon) / (1 - boxes).clamp(min=epsilon))
    return (logits + delta).sigmoid()
