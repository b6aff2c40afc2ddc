"""The image encoder of SAM, by the names of its operators."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ptq4sam.families.family import DECODER, Description, Family, Normalized, Place, Projected
from ptq4sam.families.sam_vit.huggingface import convert_names, is_huggingface, read_directory

_BLOCK = r"image_encoder\.blocks\.\d+"
_SMALL = "biases and layer norms"

ENCODER = Description(
    quantized=(
        Place(rf"{_BLOCK}\.attn\.core"),
        Place(rf"{_BLOCK}\.attn\.qkv", {"input": ("after-norm", "before-attention")}),
        Place(rf"{_BLOCK}\.attn\.proj"),
        Place(rf"{_BLOCK}\.mlp\.lin1", {"input": ("after-norm", "before-mlp")}),
        Place(rf"{_BLOCK}\.mlp\.lin2", {"input": ("after-gelu",)}),
        Place(r"image_encoder\.neck\.0"),
        Place(r"image_encoder\.neck\.2", {"input": ("after-norm",)}),
    ),
    stays_float=(r"image_encoder\.patch_embed\.proj",),
    tables=(rf"{_BLOCK}\.(attn|norm[12])", r"image_encoder\.neck\.[13]"),
    portable=(
        r"image_encoder\.patch_embed\.proj",
        rf"{_BLOCK}\.(norm[12]|mlp\.act)",
        r"image_encoder\.neck\.[13]",
    ),
    parts=(
        (r"image_encoder\.patch_embed", "patch embedding"),
        (r"image_encoder\.pos_embed", "position embedding"),
        (r"image_encoder\..*\.rel_pos", "relative positions"),
        (r"image_encoder\..*attn\.qkv", "encoder qkv"),
        (r"image_encoder\..*attn\.proj", "encoder proj"),
        (r"image_encoder\..*attn\.core\..*@windows", "encoder attention in windows"),
        (r"image_encoder\..*attn\.core\.", "encoder attention, global"),
        (r"image_encoder\..*mlp\.", "encoder MLP"),
        (r"image_encoder\.neck\.[02]", "encoder neck"),
        (r"image_encoder\.", "encoder norms"),
    ),
    sizes=(
        (r"image_encoder\.pos_embed", "position embedding"),
        (r"image_encoder\.patch_embed\.", "patch embedding"),
        (r"image_encoder\..*\.rel_pos_", "relative positions"),
        (r"image_encoder\..*\.weight\.codes$", "image encoder"),
        (r"image_encoder\.(.*\.bias$|.*\.norm|neck\.)", _SMALL),
        (r"image_encoder\.", "image encoder"),
    ),
    blocks=(_BLOCK,),
    projected=(Projected(rf"{_BLOCK}\.attn", "qkv", "qkv", "qkv", part=(1, 3)),),
    normalized=(
        Normalized(_BLOCK, "norm1", "attn.qkv"),
        Normalized(_BLOCK, "norm2", "mlp.lin1"),
    ),
    origin=("image_encoder.pos_embed", "image_encoder.patch_embed.proj.weight"),
)


def _official_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return convert_names(state) if is_huggingface(state) else dict(state)


FAMILY = Family(
    "sam_vit",
    ENCODER + DECODER,
    r"^(image_encoder\.patch_embed\.proj|vision_encoder\.patch_embed\.projection)\.",
    _official_names,
    read_directory,
)
