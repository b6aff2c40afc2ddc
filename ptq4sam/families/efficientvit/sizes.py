"""The sizes of EfficientViT SAMs: the five published ones, and a small one for 256 pixels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ptq4sam.sam.geometry import Geometry

Kind = Literal["residual", "fused", "inverted", "attention"]
"""Blocks of a stage: two convolutions, fused MBConvs, MBConvs, or linear attention and an MBConv.
"""


@dataclass(frozen=True)
class EfficientViTSize:
    """Everything that tells one EfficientViT SAM from another; defaults are L0's.

    Attributes:
        widths: channels of each stage, which halves the sides.
        depths: residual blocks of each stage, behind the one that halves.
        kinds: of these blocks.
        expansions: how many times wider the inside of a block is; of a halving one four times more.
        attention_kernel: of the aggregation of queries, keys and values.
        head_dim: channels of a head of the attention.
        neck_stages: whose outputs are joined, the deepest first.
        neck_depth: fused MBConvs behind the join.
        neck_expansion: of these.
        image_size: side of the input in pixels.
        prompt_scale: how many times longer the side of the square is that prompts are placed in.
        prompt_dim: width of embeddings.
        decoder_mlp_dim: hidden width of the decoder's MLPs.
        decoder_heads: heads of the decoder's attentions.
        iou_hidden_dim: hidden width of the head that predicts IoUs.
    """

    widths: tuple[int, ...] = (32, 64, 128, 256, 512)
    depths: tuple[int, ...] = (1, 1, 1, 4, 4)
    kinds: tuple[Kind, ...] = ("residual", "fused", "fused", "inverted", "attention")
    expansions: tuple[int, ...] = (1, 4, 4, 4, 6)
    attention_kernel: int = 5
    head_dim: int = 32
    neck_stages: tuple[int, ...] = (4, 3, 2)
    neck_depth: int = 4
    neck_expansion: int = 1
    image_size: int = 512
    prompt_scale: int = 2
    prompt_dim: int = 256
    decoder_mlp_dim: int = 2048
    decoder_heads: int = 8
    iou_hidden_dim: int = 256

    @property
    def stride(self) -> int:
        """Pixels of the input for a cell of the last stage, on either axis."""
        return int(2 ** len(self.widths))

    @property
    def grid(self) -> int:
        """Rows and columns of the embedding: those of the shallowest stage that is joined."""
        return int(self.image_size // 2 ** (self.neck_stages[-1] + 1))

    @property
    def geometry(self) -> Geometry:
        """Of its pictures."""
        features = ((self.prompt_dim, self.grid, self.grid),)
        return Geometry(self.image_size, self.prompt_scale * self.image_size, features)


L0 = EfficientViTSize()
L1 = replace(L0, depths=(1, 1, 1, 6, 6), neck_depth=8)
L2 = replace(L0, depths=(1, 2, 2, 8, 8), neck_depth=12)
XL0 = EfficientViTSize(
    widths=(32, 64, 128, 256, 512, 1024),
    depths=(0, 1, 1, 2, 3, 3),
    kinds=("residual", "fused", "fused", "fused", "attention", "attention"),
    expansions=(1, 4, 4, 4, 4, 6),
    attention_kernel=3,
    neck_stages=(5, 4, 3),
    neck_depth=6,
    neck_expansion=4,
    image_size=1024,
    prompt_scale=1,
)
XL1 = replace(XL0, depths=(1, 2, 2, 4, 6, 6), neck_depth=12)
NANO = EfficientViTSize(
    widths=(16, 32, 64, 96, 128),
    depths=(1, 1, 1, 2, 2),
    expansions=(1, 4, 4, 4, 4),
    neck_depth=2,
    image_size=256,
    prompt_scale=1,
    prompt_dim=128,
    decoder_mlp_dim=512,
    decoder_heads=4,
    iou_hidden_dim=128,
)
"""efficientvit_sam_nano's, stage by stage as L0: embeddings, decoder and the square of prompts are
those of vit_nano, which it learns from."""
