"""The sizes of TinyViT SAMs: the published one, and a small one for 256 pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ptq4sam.sam.geometry import Geometry


@dataclass(frozen=True)
class TinyViTSize:
    """Everything that tells one TinyViT SAM from another; defaults are the published ones.

    Attributes:
        dims: width of each layer.
        depths: blocks of each layer.
        num_heads: of the layers from the second on.
        window_sizes: of the same.
        strides: of the mergings between layers.
        image_size: side of the input in pixels.
        prompt_dim: width of embeddings.
        decoder_mlp_dim: hidden width of the decoder's MLPs.
        decoder_heads: heads of the decoder's attentions.
        iou_hidden_dim: hidden width of the head that predicts IoUs.
    """

    dims: tuple[int, ...] = (64, 128, 160, 320)
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (4, 5, 10)
    window_sizes: tuple[int, ...] = (7, 14, 7)
    strides: tuple[int, ...] = (2, 2, 1)
    image_size: int = 1024
    prompt_dim: int = 256
    decoder_mlp_dim: int = 2048
    decoder_heads: int = 8
    iou_hidden_dim: int = 256

    @property
    def patch_size(self) -> int:
        """Pixels of the input for a cell of the embedding, on either axis."""
        return 4 * math.prod(self.strides)

    @property
    def geometry(self) -> Geometry:
        """Of its pictures."""
        grid = self.image_size // self.patch_size
        return Geometry(self.image_size, self.image_size, ((self.prompt_dim, grid, grid),))


PUBLISHED = TinyViTSize()
"""MobileSAM's and TinySAM's."""

NANO = TinyViTSize(
    dims=(32, 96, 160, 192),
    depths=(1, 1, 3, 2),
    num_heads=(3, 5, 6),
    window_sizes=(7, 16, 8),
    strides=(2, 1, 1),
    image_size=256,
    prompt_dim=128,
    decoder_mlp_dim=512,
    decoder_heads=4,
    iou_hidden_dim=128,
)
"""tiny_vit_nano's: embeddings and decoder have the shapes of vit_nano's, which it learns from."""
