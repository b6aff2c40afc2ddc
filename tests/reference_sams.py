"""Random weights that make comparisons real, and segment-anything's own models."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ptq4sam.families.sam_vit.sizes import SamVariant


def randomize_state(state: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Random values of a trained network's size: nothing stays zero or one.

    Position tables and embeddings are as large as what they are added to, so that a mistake in any
    of them shows.
    """
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, tensor in state.items():
        values = torch.randn(tensor.shape, generator=generator)
        if name.endswith("bias"):
            values *= 0.1
        elif name.endswith("weight") and tensor.ndim == 1:
            values = 1 + 0.2 * values
        elif "rel_pos" in name or "embed" in name:
            values *= 0.5
        elif not name.endswith(
            ("matrix", "positional_embedding", "_token.weight", "_tokens.weight")
        ):
            values /= tensor[0].numel() ** 0.5
        result[name] = values
    return result


def build_reference(variant: SamVariant) -> nn.Module:
    """The segment-anything package's own Sam, in any size."""
    from segment_anything.modeling import (
        ImageEncoderViT,
        MaskDecoder,
        PromptEncoder,
        Sam,
        TwoWayTransformer,
    )

    grid = variant.image_size // variant.patch_size
    encoder = ImageEncoderViT(
        img_size=variant.image_size,
        patch_size=variant.patch_size,
        embed_dim=variant.embed_dim,
        depth=variant.depth,
        num_heads=variant.num_heads,
        mlp_ratio=variant.mlp_ratio,
        out_chans=variant.prompt_dim,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=variant.window_size,
        global_attn_indexes=variant.global_attn_indexes,
    )
    prompt_encoder = PromptEncoder(
        variant.prompt_dim, (grid, grid), (variant.image_size,) * 2, mask_in_chans=16
    )
    transformer = TwoWayTransformer(
        variant.decoder_depth, variant.prompt_dim, variant.decoder_heads, variant.decoder_mlp_dim
    )
    decoder = MaskDecoder(
        transformer_dim=variant.prompt_dim,
        transformer=transformer,
        iou_head_hidden_dim=variant.iou_hidden_dim,
    )
    return Sam(encoder, prompt_encoder, decoder).eval()
