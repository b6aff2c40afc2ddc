"""The sizes of SAM: the official ViT-B, L and H, and the small one that ships with the package."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ptq4sam.errors import ConfigError
from ptq4sam.sam.image_encoder import ImageEncoderViT
from ptq4sam.sam.mask_decoder import MaskDecoder
from ptq4sam.sam.model import Sam
from ptq4sam.sam.prompt_encoder import PromptEncoder
from ptq4sam.sam.transformer import TwoWayTransformer


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


VARIANTS: dict[str, SamVariant] = {
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


def variant_of(name: str, image_size: int | None = None) -> SamVariant:
    """A SAM by its name.

    Args:
        name: a key of VARIANTS.
        image_size: side of the input in pixels of a SAM that was fine-tuned for another; None for
            the variant's own.

    Raises:
        ConfigError: the name is unknown, or there is no such size.
    """
    if name not in VARIANTS:
        raise ConfigError(f"unknown SAM {name!r}: choose one of {', '.join(VARIANTS)}")
    variant = VARIANTS[name]
    if image_size is None:
        return variant
    if image_size < variant.patch_size or image_size % variant.patch_size:
        raise ConfigError(
            f"asked for {name} with an input of {image_size} pixels: use a multiple of its "
            f"patches' {variant.patch_size}"
        )
    return replace(variant, image_size=image_size)


def build_sam(name: str, image_size: int | None = None) -> Sam:
    """Build a SAM with random weights by its name; arguments and errors as for `variant_of`."""
    return build_variant(name, variant_of(name, image_size))


def build_variant(name: str, variant: SamVariant) -> Sam:
    """Build a SAM of any size with random weights."""
    grid = variant.image_size // variant.patch_size
    encoder = ImageEncoderViT(
        img_size=variant.image_size,
        patch_size=variant.patch_size,
        embed_dim=variant.embed_dim,
        depth=variant.depth,
        num_heads=variant.num_heads,
        mlp_ratio=variant.mlp_ratio,
        out_chans=variant.prompt_dim,
        window_size=variant.window_size,
        global_attn_indexes=variant.global_attn_indexes,
    )
    prompt_encoder = PromptEncoder(
        variant.prompt_dim, (grid, grid), (variant.image_size, variant.image_size)
    )
    transformer = TwoWayTransformer(
        variant.decoder_depth, variant.prompt_dim, variant.decoder_heads, variant.decoder_mlp_dim
    )
    decoder = MaskDecoder(
        variant.prompt_dim, transformer, iou_head_hidden_dim=variant.iou_hidden_dim
    )
    return Sam(name, encoder, prompt_encoder, decoder).eval()
