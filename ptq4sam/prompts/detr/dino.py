"""DINO (Zhang et al., 2022) with a FocalNet-L (Yang et al., 2022) and five feature levels.

Deformable DETR's encoder; the 900 best of its cells become boxes, learned queries refine them,
and a query's position is an embedding of its present box (Liu et al., "DAB-DETR", 2022).

Layout, names and constants are those of the authors' code (github.com/IDEA-Research/DINO and
github.com/FocalNet/FocalNet-DINO, which adds the backbone) under the settings of the published
table: DINO_5scale with heads that all decoder layers share, and others of the first stage. It was
tested module by module against transformers, as a whole against mmdet's DINO on random weights,
and against the names and shapes that this code gives its tensors; the weights themselves were not
at hand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ptq4sam.prompts.detr.focalnet import FocalNet, FocalNetConfig
from ptq4sam.prompts.detr.transformer import (
    DecoderLayer,
    Encoder,
    InputProjection,
    Mlp,
    encode,
    first_stage,
    refine,
    sines,
)

_EPSILON = 1e-3
_CELL_TEMPERATURE = 20.0
_BOX_TEMPERATURE = 10_000.0


@dataclass(frozen=True)
class DinoConfig:
    """Sizes; the defaults are those of the published FocalNet-L weights.

    Attributes:
        backbone: of the FocalNet.
        dim: channels of the transformer.
        ffn: channels within its feed-forward networks.
        layers: of the encoder, and of the decoder.
        heads: of each attention.
        points: places a head looks at in a level.
        levels: feature levels, four of the backbone's and more that are made of the last.
        classes: class scores; COCO's category ids are their places.
        queries: number of them.
    """

    backbone: FocalNetConfig = field(default_factory=FocalNetConfig)
    dim: int = 256
    ffn: int = 2048
    layers: int = 6
    heads: int = 8
    points: int = 4
    levels: int = 5
    classes: int = 91
    queries: int = 900


class _Decoder(nn.Module):
    def __init__(self, c: DinoConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DecoderLayer(c.dim, c.ffn, c.levels, c.heads, c.points) for _ in range(c.layers)
        )
        self.norm = nn.LayerNorm(c.dim)
        self.ref_point_head = Mlp(2 * c.dim, c.dim, c.dim)


class _Transformer(nn.Module):
    def __init__(self, c: DinoConfig) -> None:
        super().__init__()
        self.level_embed = nn.Parameter(torch.zeros(c.levels, c.dim))
        self.encoder = Encoder(c.layers, c.dim, c.ffn, c.levels, c.heads, c.points)
        self.decoder = _Decoder(c)
        self.tgt_embed = nn.Embedding(c.queries, c.dim)
        self.enc_output = nn.Linear(c.dim, c.dim)
        self.enc_output_norm = nn.LayerNorm(c.dim)
        self.enc_out_class_embed = nn.Linear(c.dim, c.classes)
        self.enc_out_bbox_embed = Mlp(c.dim, c.dim, c.dim, 4)

    def encode(self, maps: list[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
        """Cells of all levels that know of each other [batch, n, dim], and the levels' shapes."""
        return encode(self.encoder, maps, self.level_embed, _CELL_TEMPERATURE, 0.0)

    def propose(self, memory: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        """The best boxes that single cells propose, cx, cy, w, h in 0-1 [batch, queries, 4]."""
        return first_stage(
            memory,
            shapes,
            read=lambda cells: self.enc_output_norm(self.enc_output(cells)),
            score=lambda cells: self.enc_out_class_embed(cells).amax(dim=-1),
            head=self.enc_out_bbox_embed,
            count=self.tgt_embed.num_embeddings,
        )


class FocalNetDino(nn.Module):
    """The detector; see the module.

    Args:
        config: sizes.
    """

    def __init__(self, config: DinoConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or DinoConfig()
        self.backbone = nn.ModuleList([FocalNet(c.backbone)])
        self.input_proj = InputProjection(c.backbone.channels, c.levels, c.dim)
        self.transformer = _Transformer(c)
        self.class_embed = nn.Linear(c.dim, c.classes)
        self.bbox_embed = Mlp(c.dim, c.dim, c.dim, 4)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Find objects.

        Args:
            images: RGB with ImageNet's mean and deviation taken out [batch, 3, h, w].

        Returns:
            Class scores before the sigmoid [batch, queries, classes]; boxes cx, cy, w, h in 0-1
            of the image [batch, queries, 4].
        """
        decoder = self.transformer.decoder
        memory, shapes = self.transformer.encode(self.input_proj(self.backbone[0](images)))
        refined = boxes = self.transformer.propose(memory, shapes)
        x = self.transformer.tgt_embed.weight[: boxes.shape[1]].expand(len(images), -1, -1)
        for layer in decoder.layers:
            boxes = refined
            x = layer(x, self._positions(boxes), boxes, memory, shapes)
            refined = refine(boxes, self.bbox_embed(x), _EPSILON)
        # What is answered is read off the normed queries, what is passed on off the plain ones.
        x = decoder.norm(x)
        return self.class_embed(x), refine(boxes, self.bbox_embed(x), _EPSILON)

    def _positions(self, boxes: Tensor) -> Tensor:
        """Embedding of boxes [batch, q, 4], in the order y, x, w, h: [batch, q, dim]."""
        angles = boxes[..., [1, 0, 2, 3]] * 2 * math.pi
        embedded = sines(angles, self.config.dim // 2, _BOX_TEMPERATURE)
        positions: Tensor = self.transformer.decoder.ref_point_head(embedded)
        return positions
