"""TinyViT SAMs by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ptq4sam.errors import CheckpointError
from ptq4sam.families.family import Variant, Weights, require_side, with_sizes
from ptq4sam.families.tiny_vit.description import ENCODER, FAMILY
from ptq4sam.families.tiny_vit.encoder import TinyViT
from ptq4sam.families.tiny_vit.sizes import NANO, PUBLISHED, TinyViTSize
from ptq4sam.sam.assembling import DecoderSizes, assemble
from ptq4sam.sam.model import Sam

SIZES = {"mobile_sam": PUBLISHED, "tinysam": PUBLISHED, "tiny_vit_nano": NANO}

_STEM = "image_encoder.patch_embed.seq.2.c.weight"


def build_variant(name: str, size: TinyViTSize, folded: bool = True) -> Sam:
    """Build a TinyViT SAM of any size with random weights.

    Args:
        name: of the variant.
        size: its sizes.
        folded: without batch normalisations, as for inference; with them it can be trained.
    """
    encoder = TinyViT(
        size.dims,
        size.depths,
        size.num_heads,
        size.window_sizes,
        size.strides,
        size.prompt_dim,
        folded,
    )
    decoder = DecoderSizes(
        mlp_dim=size.decoder_mlp_dim,
        heads=size.decoder_heads,
        iou_hidden_dim=size.iou_hidden_dim,
    )
    return assemble(name, encoder, size.geometry, ENCODER, decoder)


def variant(name: str, weights: Weights, size: TinyViTSize | None = None) -> Variant:
    """A TinyViT SAM of SIZES, or of a size of its own."""
    size = SIZES[name] if size is None else size

    def build(side: int | None) -> Sam:
        if side is None:
            return build_variant(name, size)
        require_side(name, side, size.patch_size, "embedding's")
        return build_variant(name, replace(size, image_size=side))

    def side_of(state: Mapping[str, Tensor], origin: str) -> int:
        # Nothing in the weights depends on the side.
        _check_width(name, size, state, origin)
        return size.image_size

    def sized(own: str, changes: Mapping[str, Any]) -> Variant:
        return variant(own, weights.of_other_sizes(), with_sizes(size, changes))

    return Variant(
        name,
        FAMILY,
        size.geometry,
        build,
        weights,
        side_of,
        sized=sized,
        build_unfolded=lambda: build_variant(name, size, folded=False),
    )


VARIANTS = (
    variant(
        "mobile_sam",
        Weights("mobile_sam.pt", "mobile-sam", "github.com/ChaoningZhang/MobileSAM"),
    ),
    variant(
        "tinysam",
        Weights("tinysam_42.3.pth", "tinysam", "github.com/xinghaochen/TinySAM"),
    ),
    variant("tiny_vit_nano", Weights("tiny_vit_nano.safetensors")),
)


def _check_width(name: str, size: TinyViTSize, state: Mapping[str, Tensor], origin: str) -> None:
    """Refuse another variant's weights by the width of the first layer.

    Raises:
        CheckpointError: it is another.
    """
    width = len(state[_STEM]) if _STEM in state and state[_STEM].dim() else size.dims[0]
    if width == size.dims[0]:
        return
    others = [other for other, known in SIZES.items() if known.dims[0] == width]
    looks = f"looks like {others[0]}: ask for that" if others else "is that of no SAM known here"
    raise CheckpointError(
        f"{origin}: asked for {name} of width {size.dims[0]}, but the file's width of {width} "
        f"{looks}"
    )
