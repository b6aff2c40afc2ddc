"""TinyViT's image encoder, by the names of its operators.

As in SAM the layer that sees pixels stays float. Every other convolution is quantized, those of one
filter a channel too, and every linear layer and attention.
"""

from __future__ import annotations

from ptq4sam.families.family import DECODER, Description, Family, Normalized, Place
from ptq4sam.families.tiny_vit.weights import fold_state

_ENCODER = r"image_encoder"
_BLOCK = rf"{_ENCODER}\.layers\.[1-9]\d*\.blocks\.\d+"
_BLOCK_OF_CONVOLUTIONS = rf"{_ENCODER}\.layers\.0\.blocks\.\d+"
_MERGING = rf"{_ENCODER}\.layers\.\d+\.downsample"
_CONVOLUTIONS = rf"({_BLOCK_OF_CONVOLUTIONS}|{_MERGING})"
_STEM = rf"{_ENCODER}\.patch_embed\.seq"
_SMALL = "biases and layer norms"

ENCODER = Description(
    quantized=(
        Place(rf"{_STEM}\.2\.c", {"input": ("after-gelu",)}),
        # Blocks of convolutions end with a GELU.
        Place(rf"{_ENCODER}\.layers\.0\.blocks\.0\.conv1\.c"),
        Place(
            rf"{_ENCODER}\.layers\.0\.(blocks\.\d+|downsample)\.conv1\.c",
            {"input": ("after-gelu",)},
        ),
        Place(rf"{_MERGING}\.conv1\.c"),
        Place(rf"{_CONVOLUTIONS}\.conv[23]\.c", {"input": ("after-gelu",)}),
        Place(rf"{_BLOCK}\.attn\.core"),
        Place(rf"{_BLOCK}\.attn\.qkv", {"input": ("after-norm", "before-attention")}),
        Place(rf"{_BLOCK}\.attn\.proj"),
        Place(rf"{_BLOCK}\.local_conv\.c"),
        Place(rf"{_BLOCK}\.mlp\.fc1", {"input": ("after-norm", "before-mlp")}),
        Place(rf"{_BLOCK}\.mlp\.fc2", {"input": ("after-gelu",)}),
        Place(rf"{_ENCODER}\.neck\.0"),
        Place(rf"{_ENCODER}\.neck\.2", {"input": ("after-norm",)}),
    ),
    stays_float=(rf"{_STEM}\.0\.c",),
    tables=(rf"{_BLOCK}\.(attn|attn\.norm|mlp\.norm)", rf"{_ENCODER}\.neck\.[13]"),
    portable=(
        rf"{_STEM}\.(0\.c|1)",
        rf"{_CONVOLUTIONS}\.act\d",
        rf"{_BLOCK}\.(attn\.norm|mlp\.norm|mlp\.act)",
        rf"{_ENCODER}\.neck\.[13]",
    ),
    parts=(
        (rf"{_ENCODER}\.patch_embed", "patch embedding"),
        (rf"{_ENCODER}\.layers\.0\.blocks", "encoder convolution blocks"),
        (_MERGING, "encoder mergings"),
        (rf"{_BLOCK}\.local_conv", "encoder local convolutions"),
        (rf"{_BLOCK}\.attn\.qkv", "encoder qkv"),
        (rf"{_BLOCK}\.attn\.proj", "encoder proj"),
        (rf"{_BLOCK}\.attn\.core\.", "encoder attention in windows"),
        (rf"{_BLOCK}\.attn\.attention_biases", "relative positions"),
        (rf"{_BLOCK}\.mlp\.fc", "encoder MLP"),
        (rf"{_ENCODER}\.neck\.[02]", "encoder neck"),
        (rf"{_ENCODER}\.", "encoder norms"),
    ),
    sizes=(
        (rf"{_STEM}\.0", "patch embedding"),
        (rf"{_BLOCK}\.attn\.attention_biases", "relative positions"),
        (rf"{_ENCODER}\..*\.weight\.codes$", "image encoder"),
        (rf"{_ENCODER}\.(.*\.bias$|.*\.norm|neck\.)", _SMALL),
        (rf"{_ENCODER}\.", "image encoder"),
    ),
    blocks=(rf"{_ENCODER}\.layers\.\d+\.blocks\.\d+", _MERGING),
    normalized=(
        Normalized(rf"{_BLOCK}\.attn", "norm", "qkv"),
        Normalized(rf"{_BLOCK}\.mlp", "norm", "fc1"),
    ),
    origin=("image_encoder.patch_embed.seq.0.c.weight",),
)

FAMILY = Family(
    "tiny_vit",
    ENCODER + DECODER,
    r"^image_encoder\.patch_embed\.seq\.",
    fold_state,
)
