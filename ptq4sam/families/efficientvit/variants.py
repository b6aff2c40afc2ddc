"""EfficientViT SAMs by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from ptq4sam.errors import CheckpointError
from ptq4sam.families.efficientvit.description import (
    FAMILY,
    describe_encoder,
    describe_unfolded,
)
from ptq4sam.families.efficientvit.encoder import EfficientViT
from ptq4sam.families.efficientvit.layers import NORM_EPS
from ptq4sam.families.efficientvit.sizes import (
    L0,
    L1,
    L2,
    NANO,
    XL0,
    XL1,
    EfficientViTSize,
)
from ptq4sam.families.family import Variant, Weights, require_side, with_sizes
from ptq4sam.sam.assembling import DecoderSizes, assemble
from ptq4sam.sam.model import Sam

PUBLISHED = {
    f"efficientvit_sam_{name}": size
    for name, size in {"l0": L0, "l1": L1, "l2": L2, "xl0": XL0, "xl1": XL1}.items()
}
SIZES = {**PUBLISHED, "efficientvit_sam_nano": NANO}

_BLOCK = re.compile(r"image_encoder\.backbone\.stages\.(\d+)\.op_list\.(\d+)\.")


def build_variant(name: str, size: EfficientViTSize, folded: bool = True) -> Sam:
    """Build an EfficientViT SAM of any size with random weights.

    Args:
        name: of the variant.
        size: its sizes.
        folded: without batch normalisations, as for inference; with them it can be trained.
    """
    decoder = DecoderSizes(
        mlp_dim=size.decoder_mlp_dim,
        heads=size.decoder_heads,
        iou_hidden_dim=size.iou_hidden_dim,
        norm_eps=NORM_EPS,
    )
    encoder = EfficientViT(size, folded)
    description = describe_encoder(size) if folded else describe_unfolded(size)
    return assemble(name, encoder, size.geometry, description, decoder)


def variant(name: str, size: EfficientViTSize, weights: Weights) -> Variant:
    """An EfficientViT SAM of a size."""

    def build(folded: bool, side: int | None) -> Sam:
        if side is None:
            return build_variant(name, size, folded)
        require_side(name, side, size.stride, "last stage's")
        return build_variant(name, replace(size, image_size=side), folded)

    def side_of(state: Mapping[str, Tensor], origin: str) -> int:
        # Nothing in the weights depends on the side.
        _check_depths(name, size, state, origin)
        return size.image_size

    def sized(own: str, changes: Mapping[str, Any]) -> Variant:
        return variant(own, with_sizes(size, changes), weights.of_other_sizes())

    own = Variant(
        name,
        FAMILY,
        size.geometry,
        partial(build, True),
        weights,
        side_of,
        sized=sized,
        build_unfolded=partial(build, False, None),
    )
    unfolded = replace(own, family=replace(FAMILY, fold=dict), build=partial(build, False))
    return replace(own, unfolded=unfolded)


def _published(name: str) -> Variant:
    download, source = name.replace("_", "-"), "huggingface.co/mit-han-lab/efficientvit-sam"
    return variant(name, SIZES[name], Weights(f"{name}.pt", download, source))


VARIANTS = (
    *map(_published, PUBLISHED),
    variant("efficientvit_sam_nano", NANO, Weights("efficientvit_sam_nano.safetensors")),
)


def _check_depths(
    name: str, size: EfficientViTSize, state: Mapping[str, Tensor], origin: str
) -> None:
    """Refuse another variant's weights by the number of blocks of each stage.

    Raises:
        CheckpointError: it is another.
    """
    last: dict[int, int] = {}
    for key in state:
        if found := _BLOCK.match(key):
            stage, block = map(int, found.groups())
            last[stage] = max(block, last.get(stage, 0))
    depths = tuple(last[stage] for stage in sorted(last))
    if depths == size.depths:
        return
    others = [other for other, known in SIZES.items() if known.depths == depths]
    looks = f"looks like {others[0]}: ask for that" if others else "is that of no SAM known here"
    raise CheckpointError(
        f"{origin}: asked for {name} with {_listed(size.depths)} blocks behind the first of each "
        f"stage, but the file with {_listed(depths)} {looks}"
    )


def _listed(depths: tuple[int, ...]) -> str:
    return "-".join(map(str, depths)) or "none"
