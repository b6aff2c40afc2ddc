"""SAMs by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from ptq4sam.errors import CheckpointError
from ptq4sam.families.family import Variant, Weights, require_side, with_sizes
from ptq4sam.families.sam_vit.description import ENCODER, FAMILY
from ptq4sam.families.sam_vit.image_encoder import ImageEncoderViT
from ptq4sam.families.sam_vit.sizes import SIZES, SamVariant
from ptq4sam.families.sam_vit.two_peaks import with_two_peaks
from ptq4sam.operators.bias import table_of_size
from ptq4sam.sam.assembling import DecoderSizes, assemble
from ptq4sam.sam.model import Sam

_POSITIONS = "image_encoder.pos_embed"
_RELATIVE = ("rel_pos_h", "rel_pos_w")


def build_variant(name: str, size: SamVariant) -> Sam:
    """Build a SAM of any size with random weights."""
    encoder = ImageEncoderViT(
        img_size=size.image_size,
        patch_size=size.patch_size,
        embed_dim=size.embed_dim,
        depth=size.depth,
        num_heads=size.num_heads,
        mlp_ratio=size.mlp_ratio,
        out_chans=size.prompt_dim,
        window_size=size.window_size,
        global_attn_indexes=size.global_attn_indexes,
    )
    decoder = DecoderSizes(
        size.decoder_mlp_dim, size.decoder_heads, size.decoder_depth, size.iou_hidden_dim
    )
    return assemble(name, encoder, size.geometry, ENCODER, decoder)


def variant(name: str, size: SamVariant, weights: Weights) -> Variant:
    """A SAM of some size under a name."""

    def build(side: int | None) -> Sam:
        if side is None:
            return build_variant(name, size)
        require_side(name, side, size.patch_size, "patches'")
        return build_variant(name, replace(size, image_size=side))

    def side_of(state: Mapping[str, Tensor], origin: str) -> int:
        return _side_of(name, size, state, origin)

    def fit(key: str, tensor: Tensor, own: Tensor) -> Tensor:
        if not _is_global_table(size, key, tensor):
            return tensor
        return table_of_size(tensor, (len(own) + 1) // 2).contiguous()

    def sized(own: str, changes: Mapping[str, Any]) -> Variant:
        return variant(own, with_sizes(size, changes), weights.of_other_sizes())

    return Variant(name, FAMILY, size.geometry, build, weights, side_of, fit, sized=sized)


def _official(name: str, file: str) -> Variant:
    weights = Weights(file, f"sam-{name.replace('_', '-')}")
    return variant(name, SIZES[name], weights)


def _embedded(name: str) -> Variant:
    found = variant(name, SIZES["vit_nano"], Weights("vit_nano.safetensors"))
    # Chosen on pictures that it was trained on, for at most 100 masks a picture:
    # benchmarks/everything_thresholds.py.
    return replace(found, everything={"pred_iou_thresh": 0.25, "stability_score_thresh": 0.1})


VARIANTS = (
    _official("vit_b", "sam_vit_b_01ec64.pth"),
    _official("vit_l", "sam_vit_l_0b3195.pth"),
    _official("vit_h", "sam_vit_h_4b8939.pth"),
    _embedded("vit_nano"),
    replace(
        _embedded("vit_nano_bimodal"),
        remake=partial(with_two_peaks, description=FAMILY.description),
        sized=None,
    ),
)


def _side_of(name: str, size: SamVariant, state: Mapping[str, Tensor], origin: str) -> int:
    """Side in pixels of the input that tensors were trained for.

    Raises:
        CheckpointError: the position embedding is another variant's, or no square.
    """
    positions = state.get(_POSITIONS)
    if positions is None:
        return size.image_size
    wanted = size.embed_dim
    width = positions.shape[-1] if positions.dim() else wanted
    if width != wanted:
        others = [other for other, known in SIZES.items() if known.embed_dim == width]
        looks = (
            f"looks like {others[0]}: ask for that" if others else "is that of no SAM known here"
        )
        raise CheckpointError(
            f"{origin}: asked for {name} of width {wanted}, but the file's width of {width} {looks}"
        )
    if positions.dim() != 4 or positions.shape[1] != positions.shape[2]:
        raise CheckpointError(
            f"{origin}: {name} needs {_POSITIONS} of shape (1, n, n, {wanted}), but found "
            f"{tuple(positions.shape)}; give weights for square pictures"
        )
    return positions.shape[1] * size.patch_size


def _is_global_table(size: SamVariant, key: str, tensor: Tensor) -> bool:
    """Whether a tensor holds relative positions of a whole picture of the variant's own size.

    A model that was fine-tuned for another size may have kept them: it interpolates them in each
    pass, which comes to the same as once.
    """
    words = key.split(".")
    return (
        words[-1] in _RELATIVE
        and tensor.dim() == 2
        and int(words[2]) in size.global_attn_indexes
        and len(tensor) == 2 * size.grid - 1
    )
