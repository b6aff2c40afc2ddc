"""EfficientViT's image encoder, by the names of its operators.

As in SAM the layer that sees pixels stays float. Every other convolution is quantized, those of one
filter a channel too, and the linear attention.
"""

from __future__ import annotations

from dataclasses import replace

from ptq4sam.families.efficientvit.sizes import L0, EfficientViTSize
from ptq4sam.families.efficientvit.weights import fold_state
from ptq4sam.families.family import DECODER, Description, Family, Place, Scaled
from ptq4sam.sam.addresses import Addressed

_ENCODER = r"image_encoder"
_STAGES = rf"{_ENCODER}\.backbone\.stages"
_BLOCK = rf"{_STAGES}\.\d+\.op_list\.\d+"
_STEM = rf"{_STAGES}\.0\.op_list\.0"
_ATTENTION = rf"{_BLOCK}\.context_module\.main"
_MBCONV = rf"{_BLOCK}\.(main|local_module\.main)"
_NECK = rf"{_ENCODER}\.neck"
_AFTER_GELU = {"input": ("after-gelu",)}
_SMALL = "biases and layer norms"


def describe_encoder(size: EfficientViTSize) -> Description:
    """The description of the encoder of a size, its batch normalisations folded."""
    fused = "|".join(str(stage) for stage, kind in enumerate(size.kinds) if kind == "fused")
    fused_block = rf"({_STAGES}\.({fused})|{_NECK}\.middle)\.op_list\.\d+\.main"
    behind_stem = rf"{_STAGES}\.0\.op_list\.1\.main\.conv1\.conv"
    if not size.depths[0]:
        behind_stem = rf"{_STAGES}\.1\.op_list\.0\.main\.\w+_conv\.conv"
    return Description(
        quantized=(
            Place(behind_stem, _AFTER_GELU),
            Place(rf"{_BLOCK}\.main\.conv1\.conv"),
            Place(rf"{_BLOCK}\.main\.conv2\.conv", _AFTER_GELU),
            Place(rf"{fused_block}\.spatial_conv\.conv"),
            Place(rf"{fused_block}\.point_conv\.conv", _AFTER_GELU),
            Place(rf"{_MBCONV}\.inverted_conv\.conv"),
            Place(rf"{_MBCONV}\.(depth|point)_conv\.conv", _AFTER_GELU),
            Place(rf"{_ATTENTION}\.core", {"query": ("after-relu",), "key": ("after-relu",)}),
            Place(rf"{_ATTENTION}\.((qkv|proj)\.conv|aggreg\.0\.[01])"),
            Place(rf"{_NECK}\.(input|output)_ops\.\d+\.op_list\.0\.conv"),
        ),
        stays_float=(rf"{_STEM}\.conv",),
        tables=(
            rf"{_ENCODER}\.norm",
            rf"{_MBCONV}\.depth_conv\.act",
            rf"{fused_block}\.spatial_conv\.act",
        ),
        portable=(
            rf"{_STEM}\.conv",
            rf"{_ENCODER}\..*\.act",
            rf"{_NECK}\.input_ops\.\d+\.resize",
            rf"{_ENCODER}\.norm",
        ),
        parts=(
            (rf"{_STEM}\.", "stem"),
            (rf"{_BLOCK}\.main\.conv[12]", "encoder residual blocks"),
            (rf"{_NECK}\.", "encoder neck"),
            (rf"{fused_block}\.spatial_conv", "encoder fused blocks, 3x3"),
            (rf"{fused_block}\.point_conv", "encoder fused blocks, 1x1"),
            (rf"{_MBCONV}\.inverted_conv", "encoder MBConv, expand"),
            (rf"{_MBCONV}\.depth_conv", "encoder MBConv, depthwise"),
            (rf"{_MBCONV}\.point_conv", "encoder MBConv, project"),
            (rf"{_ATTENTION}\.core\.", "encoder attention"),
            (rf"{_ATTENTION}\.proj", "encoder proj"),
            (rf"{_ATTENTION}\.", "encoder qkv"),
            (rf"{_ENCODER}\.norm", "encoder norms"),
        ),
        sizes=(
            (rf"{_ENCODER}\..*\.weight\.codes$", "image encoder"),
            (rf"{_STEM}\.conv\.weight", "stem"),
            (rf"{_ENCODER}\.(.*\.bias$|norm\.)", _SMALL),
            (rf"{_ENCODER}\.", "image encoder"),
        ),
        blocks=(_BLOCK, rf"{_NECK}\.middle\.op_list\.\d+", rf"{_NECK}\.(input|output)_ops\.\d+"),
        scaled=(
            Scaled(fused_block, "spatial_conv.act", "point_conv.conv"),
            Scaled(_MBCONV, "depth_conv.act", "point_conv.conv"),
        ),
        addressed=_addresses(size, "conv"),
        origin=("image_encoder.backbone.stages.0.op_list.0.conv.weight",),
    )


def describe_unfolded(size: EfficientViTSize) -> Description:
    """The description of the encoder with its batch normalisations, for `compat: study`.

    Beside each convolution, that of pixels too, the normalisation and the activation behind it are
    quantized, and share its address.
    """
    each = "(conv|norm|act)"
    return replace(
        describe_encoder(size),
        quantized=(
            Place(rf"{_ENCODER}\.(backbone|neck)\..*\.{each}"),
            Place(rf"{_ATTENTION}\.(core|aggreg\.0\.[01])"),
        ),
        stays_float=(),
        tables=(rf"{_ENCODER}\.norm",),
        portable=(),
        scaled=(),
        addressed=_addresses(size, each),
    )


def _addresses(size: EfficientViTSize, each: str) -> tuple[Addressed, ...]:
    """Addresses as Bengs and Ryhede Bengtsson (2024) count them.

    A block's layers are counted from 0; the aggregations of an attention share the address of its
    qkv. The neck's blocks are its joins, the fused blocks behind them, and its output.

    Args:
        size: of the encoder.
        each: pattern of what has the address of a convolution.
    """
    block = rf"{_STAGES}\.(?P<stage>\d+)\.op_list\.(?P<block>\d+)"
    attention, local = rf"{block}\.context_module\.main", rf"{block}\.local_module\.main"
    joins = len(size.neck_stages)
    fused = rf"{_NECK}\.middle\.op_list\.(?P<block>\d+)\.main"
    is_fused = "|".join(str(stage) for stage, kind in enumerate(size.kinds) if kind == "fused")
    of_fused = block.replace(r"(?P<stage>\d+)", f"(?P<stage>{is_fused})")
    mixing = ("inverted_conv", "expand"), ("depth_conv", "depthwise"), ("point_conv", "project")
    return (
        Addressed(rf"{_STAGES}\.(?P<stage>0)\.op_list\.0\.{each}", "stem"),
        *(Addressed(rf"{block}\.main\.conv{n + 1}\.{each}", "residual", layer=n) for n in (0, 1)),
        *(
            Addressed(rf"{of_fused}\.main\.{part}_conv\.{each}", "fused", layer=n)
            for n, part in enumerate(("spatial", "point"))
        ),
        *(
            Addressed(rf"{within}\.{part}\.{each}", kind, layer=first + n)
            for within, first in ((rf"{block}\.main", 0), (local, 3))
            for n, (part, kind) in enumerate(mixing)
        ),
        Addressed(rf"{attention}\.(qkv\.{each}|aggreg\.0\.[01])", "qkv"),
        Addressed(rf"{attention}\.core", "product", layer=1),
        Addressed(rf"{attention}\.proj\.{each}", "proj", layer=2),
        Addressed(rf"{_NECK}\.input_ops\.(?P<block>\d+)\.op_list\.0\.{each}", "join", "neck"),
        *(
            Addressed(rf"{fused}\.{part}_conv\.{each}", "fused", "neck", n, joins)
            for n, part in enumerate(("spatial", "point"))
        ),
        Addressed(
            rf"{_NECK}\.output_ops\.0\.op_list\.0\.{each}",
            "output",
            "neck",
            block=joins + size.neck_depth,
        ),
    )


FAMILY = Family(
    "efficientvit",
    describe_encoder(L0) + DECODER,
    r"^image_encoder\.backbone\.stages\.\d+\.op_list\.",
    fold_state,
)
