"""What all families share: the prompt encoder and the mask decoder, described."""

from __future__ import annotations

from ptq4sam.sam.description import Description, Foldable, Place, Projected

_TO_IMAGE = r"mask_decoder\.transformer\.(layers\.\d+\.cross_attn|final_attn)_token_to_image"
_ATTENTION = (
    r"mask_decoder\.transformer\.(layers\.\d+\.(self_attn|cross_attn_token_to_image|"
    r"cross_attn_image_to_token)|final_attn_token_to_image)"
)
_BIMODAL = {"query": ("token-to-image",), "key": ("token-to-image",)}

DECODER = Description(
    quantized=(
        Place(rf"{_TO_IMAGE}\.core", _BIMODAL),
        Place(rf"{_ATTENTION}\.core"),
        Place(rf"{_ATTENTION}\.(q_proj|k_proj|v_proj)", {"input": ("before-attention",)}),
        Place(rf"{_ATTENTION}\.out_proj"),
        Place(
            r"mask_decoder\.transformer\.layers\.\d+\.mlp\.lin1",
            {"input": ("after-norm", "before-mlp")},
        ),
        Place(r"mask_decoder\.transformer\.layers\.\d+\.mlp\.lin2", {"input": ("after-relu",)}),
    ),
    stays_float=(
        r"prompt_encoder(\.pe_layer|\.mask_downscaling\.[036])?",
        r"mask_decoder\.output_upscaling\.[03]",
        r"mask_decoder\.(output_hypernetworks_mlps\.[0-3]|iou_prediction_head)\.layers\.[0-2]",
    ),
    tables=(
        r"|image_encoder",
        r"prompt_encoder\.(point_embeddings\.[0-3]|not_a_point_embed|no_mask_embed)",
        r"prompt_encoder\.mask_downscaling\.[14]",
        r"mask_decoder\.(iou_token|mask_tokens|output_upscaling\.1)",
        r"mask_decoder\.transformer\.(layers\.\d+\.norm\d|norm_final_attn)",
    ),
    portable=(
        r"prompt_encoder\.pe_layer",
        r"mask_decoder\.output_upscaling\.1",
        r"mask_decoder\.transformer\.(layers\.\d+\.norm\d|norm_final_attn)",
    ),
    parts=(
        (r"prompt_encoder\.", "prompt encoder"),
        (r"mask_decoder\.transformer\..*_proj", "decoder projections"),
        (r"mask_decoder\.transformer\..*core\.", "decoder attention"),
        (r"mask_decoder\.transformer\..*mlp\.", "decoder MLP"),
        (r"mask_decoder\.transformer\.", "decoder norms"),
        (r"mask_decoder\.", "decoder heads"),
    ),
    sizes=(
        (r"prompt_encoder\..*\.bias$", "biases and layer norms"),
        (r"prompt_encoder\.", "prompt encoder"),
        (r"mask_decoder\.transformer(\..*)?(\.bias$|\.norm)", "biases and layer norms"),
        (r"mask_decoder\.transformer\.", "mask decoder transformer"),
        (r"mask_decoder\.", "mask decoder heads"),
    ),
    blocks=(r"mask_decoder\.transformer\.layers\.\d+",),
    foldable=(Foldable(_TO_IMAGE, "q_proj", "k_proj"),),
    projected=(Projected(_ATTENTION, "q_proj", "k_proj", "v_proj"),),
    origin=("mask_decoder.mask_tokens.weight",),
    upscaling=(
        Place(r"mask_decoder\.output_upscaling\.0"),
        Place(r"mask_decoder\.output_upscaling\.3", {"input": ("after-gelu",)}),
    ),
    upscaling_portable=(r"mask_decoder\.output_upscaling\.2",),
)
"""The prompt encoder and the mask decoder of all families."""
