"""The sizes of SAM: the official ViT-B, L and H, and the small one that ships with the package."""

from __future__ import annotations

from dataclasses import dataclass

from ptq4sam.sam.geometry import Geometry


@dataclass(frozen=True)
class SamVariant:
    """Everything that tells one SAM from another; defaults are those of the official models."""

    embed_dim: int
    depth: int
    num_heads: int
    global_attn_indexes: tuple[int, ...]
    image_size: int = 1024
    patch_size: int = 16
    mlp_ratio: float = 4.0
    window_size: int = 14
    prompt_dim: int = 256
    decoder_mlp_dim: int = 2048
    decoder_heads: int = 8
    decoder_depth: int = 2
    iou_hidden_dim: int = 256

    @property
    def grid(self) -> int:
        """Rows, and columns, of patches."""
        return self.image_size // self.patch_size

    @property
    def geometry(self) -> Geometry:
        """Of its pictures."""
        features = (self.prompt_dim, self.grid, self.grid)
        return Geometry(self.image_size, self.image_size, (features,))


SIZES: dict[str, SamVariant] = {
    "vit_b": SamVariant(768, 12, 12, (2, 5, 8, 11)),
    "vit_l": SamVariant(1024, 24, 16, (5, 11, 17, 23)),
    "vit_h": SamVariant(1280, 32, 16, (7, 15, 23, 31)),
    "vit_nano": SamVariant(
        160,
        6,
        5,
        (3,),
        image_size=256,
        patch_size=8,
        window_size=8,
        prompt_dim=128,
        decoder_mlp_dim=512,
        decoder_heads=4,
        iou_hidden_dim=128,
    ),
}
