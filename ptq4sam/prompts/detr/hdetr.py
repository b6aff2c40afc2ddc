"""H-Deformable-DETR (Jia et al., "DETRs with Hybrid Matching", 2023) with a ResNet-50.

Deformable DETR (Zhu et al., 2021) in two stages with box refinement, looking forward twice and
with mixed selection (both Zhang et al., "DINO", 2022). The second kind of queries, those of
one-to-many matching, helps training alone: their embeddings are in the weights and are not used.

Layout, names and constants are those of the authors' code (github.com/HDETR/H-Deformable-DETR,
main branch of 2022). It was tested against Deformable DETR of transformers, which is the same
network but for mixed selection, and against the names and shapes of the authors' weights; the
weights themselves were not at hand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptq4sam.errors import DependencyError
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

_EPSILON = 1e-5
_TEMPERATURE = 10_000.0


@dataclass(frozen=True)
class HDetrConfig:
    """Sizes; the defaults are those of the published R50 weights.

    Attributes:
        depths: bottleneck blocks of the four stages of the ResNet.
        dim: channels of the transformer.
        ffn: channels within its feed-forward networks.
        layers: of the encoder, and of the decoder.
        heads: of each attention.
        points: places a head looks at in a level.
        levels: feature levels, three of the backbone's and more that are made of the last.
        classes: class scores; COCO's category ids are their places.
        queries: one-to-one queries, those that answer.
        training_queries: one-to-many queries, of which there are embeddings only.
        mixed_selection: queries start from learned content; otherwise from that of the proposals.
    """

    depths: tuple[int, ...] = (3, 4, 6, 3)
    dim: int = 256
    ffn: int = 2048
    layers: int = 6
    heads: int = 8
    points: int = 4
    levels: int = 4
    classes: int = 91
    queries: int = 300
    training_queries: int = 1500
    mixed_selection: bool = True


class _Body(nn.Module):
    """The stages of a ResNet (He et al., 2016) with frozen batch norms.

    Raises:
        DependencyError: torchvision is not installed.
    """

    channels = (512, 1024, 2048)

    def __init__(self, depths: tuple[int, ...]) -> None:
        super().__init__()
        try:
            from torchvision.models.resnet import Bottleneck, ResNet
            from torchvision.ops import FrozenBatchNorm2d
        except ImportError as error:
            raise DependencyError(
                "H-Deformable-DETR needs torchvision, which is not installed here: "
                "pip install torchvision"
            ) from error
        whole = ResNet(Bottleneck, list(depths), norm_layer=FrozenBatchNorm2d)
        self.conv1: nn.Module = whole.conv1
        self.bn1: nn.Module = whole.bn1
        self.layer1: nn.Module = whole.layer1
        self.layer2: nn.Module = whole.layer2
        self.layer3: nn.Module = whole.layer3
        self.layer4: nn.Module = whole.layer4

    def forward(self, x: Tensor) -> list[Tensor]:
        x = nn.functional.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, stride=2, padding=1)
        x = self.layer1(x)
        eighth = self.layer2(x)
        sixteenth = self.layer3(eighth)
        return [eighth, sixteenth, self.layer4(sixteenth)]


class _Backbone(nn.Module):
    def __init__(self, depths: tuple[int, ...]) -> None:
        super().__init__()
        self.body = _Body(depths)

    def forward(self, x: Tensor) -> list[Tensor]:
        features: list[Tensor] = self.body(x)
        return features


class _Decoder(nn.Module):
    def __init__(self, c: HDetrConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DecoderLayer(c.dim, c.ffn, c.levels, c.heads, c.points) for _ in range(c.layers)
        )


class _Transformer(nn.Module):
    def __init__(self, c: HDetrConfig) -> None:
        super().__init__()
        self.level_embed = nn.Parameter(torch.zeros(c.levels, c.dim))
        self.encoder = Encoder(c.layers, c.dim, c.ffn, c.levels, c.heads, c.points)
        self.decoder = _Decoder(c)
        self.enc_output = nn.Linear(c.dim, c.dim)
        self.enc_output_norm = nn.LayerNorm(c.dim)
        self.pos_trans = nn.Linear(2 * c.dim, 2 * c.dim)
        self.pos_trans_norm = nn.LayerNorm(2 * c.dim)

    def encode(self, maps: list[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
        """Cells of all levels that know of each other [batch, n, dim], and the levels' shapes."""
        return encode(self.encoder, maps, self.level_embed, _TEMPERATURE, 0.5)


class HDetr(nn.Module):
    """The detector; see the module.

    Args:
        config: sizes.
    """

    def __init__(self, config: HDetrConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or HDetrConfig()
        self.backbone = nn.ModuleList([_Backbone(c.depths)])
        self.input_proj = InputProjection(_Body.channels, c.levels, c.dim)
        self.transformer = _Transformer(c)
        # The last head of each is that of the first stage.
        self.class_embed = nn.ModuleList(nn.Linear(c.dim, c.classes) for _ in range(c.layers + 1))
        self.bbox_embed = nn.ModuleList(Mlp(c.dim, c.dim, c.dim, 4) for _ in range(c.layers + 1))
        if c.mixed_selection:
            self.query_embed = nn.Embedding(c.queries + c.training_queries, c.dim)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Find objects.

        Args:
            images: RGB with ImageNet's mean and deviation taken out [batch, 3, h, w].

        Returns:
            Class scores before the sigmoid [batch, queries, classes]; boxes cx, cy, w, h in 0-1
            of the image [batch, queries, 4].
        """
        transformer = self.transformer
        maps = self.input_proj(self.backbone[0](images))
        memory, shapes = transformer.encode(maps)
        boxes = self._first_stage(memory, shapes)
        angles = sines(boxes * 2 * math.pi, self.config.dim // 2, _TEMPERATURE)
        placed = transformer.pos_trans_norm(transformer.pos_trans(angles))
        positions, x = placed.chunk(2, dim=-1)
        if self.config.mixed_selection:
            x = self.query_embed.weight[: boxes.shape[1]].expand(len(images), -1, -1)
        for layer, head in zip(transformer.decoder.layers, self.bbox_embed, strict=False):
            x = layer(x, positions, boxes, memory, shapes)
            boxes = refine(boxes, head(x), _EPSILON)
        return self.class_embed[-2](x), boxes

    def _first_stage(self, memory: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        """The best boxes that single cells propose, cx, cy, w, h in 0-1 [batch, queries, 4]."""
        transformer = self.transformer
        return first_stage(
            memory,
            shapes,
            read=lambda cells: transformer.enc_output_norm(transformer.enc_output(cells)),
            # This stage knows one class, "object", which is the first.
            score=lambda cells: self.class_embed[-1](cells)[..., 0],
            head=self.bbox_embed[-1],
            count=self.config.queries,
        )
