"""Detectors of transformers with few random weights, saved as folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

SIDE = 128
KINDS = ("detr", "deformable_detr", "rt_detr_v2", "d_fine", "rf_detr")

_WIDTHS = [8, 16, 16, 32]
_LEVELS = ["stage2", "stage3", "stage4"]
_RESNET = {"embedding_size": 8, "hidden_sizes": _WIDTHS, "depths": [1] * 4, "layer_type": "basic"}
_LAYERS = {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
_HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
_HYBRID = dict(
    encoder_hidden_dim=32,
    encoder_in_channels=_WIDTHS[1:],
    encoder_layers=1,
    encoder_ffn_dim=32,
    d_model=32,
    num_queries=20,
    decoder_in_channels=[32] * 3,
    decoder_ffn_dim=32,
    decoder_layers=2,
    num_denoising=0,
    **_HEADS,
)


def config(kind: str, labels: Sequence[str]) -> Any:
    import transformers as t

    names = {
        "id2label": dict(enumerate(labels)),
        "label2id": {name: i for i, name in enumerate(labels)},
    }
    if kind == "detr":
        backbone = t.ResNetConfig(**_RESNET, out_features=["stage4"])
        small = dict(d_model=32, num_queries=20, **_LAYERS, **_HEADS)
        return t.DetrConfig(backbone_config=backbone, **small, **names)
    if kind == "deformable_detr":
        backbone = t.ResNetConfig(**_RESNET, out_features=_LEVELS)
        two_stage = {"two_stage": True, "with_box_refine": True, "two_stage_num_proposals": 20}
        small = dict(d_model=64, num_queries=20, **_LAYERS, **_HEADS, **two_stage)
        return t.DeformableDetrConfig(backbone_config=backbone, **small, **names)
    if kind == "rt_detr_v2":
        backbone = t.RTDetrResNetConfig(**_RESNET, out_features=_LEVELS)
        return t.RTDetrV2Config(backbone_config=backbone, **_HYBRID, **names)
    if kind == "d_fine":
        return t.DFineConfig(backbone_config=_hgnet(t), **_HYBRID, **names)
    backbone = t.RfDetrDinov2Config(
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=16,
        num_windows=2,
        out_features=["stage2", "stage4"],
    )
    return t.RfDetrConfig(
        backbone_config=backbone,
        d_model=32,
        num_queries=20,
        group_detr=2,
        decoder_layers=2,
        decoder_ffn_dim=32,
        decoder_self_attention_heads=2,
        decoder_cross_attention_heads=2,
        **names,
    )


def _hgnet(t: Any) -> Any:
    return t.HGNetV2Config(
        stem_channels=[3, 8, 8],
        embedding_size=8,
        hidden_sizes=_WIDTHS,
        depths=[1] * 4,
        stage_in_channels=[8, 8, 16, 16],
        stage_mid_channels=[8] * 4,
        stage_out_channels=_WIDTHS,
        stage_num_blocks=[1] * 4,
        stage_downsample=[False, True, True, True],
        stage_light_block=[False, False, True, True],
        stage_kernel_size=[3] * 4,
        stage_numb_of_layers=[1] * 4,
        out_features=_LEVELS,
    )


def processor(kind: str) -> Any:
    import transformers as t

    classes = {
        "detr": t.DetrImageProcessor,
        "deformable_detr": t.DeformableDetrImageProcessor,
        "rf_detr": t.RfDetrImageProcessor,
    }
    return classes.get(kind, t.RTDetrImageProcessor)(size={"height": SIDE, "width": SIDE})


def save(kind: str, folder: Path, labels: Sequence[str], seed: int = 0) -> Any:
    """Writes model and image processor, and returns the model."""
    from transformers import AutoModelForObjectDetection

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForObjectDetection.from_config(config(kind, labels)).eval()
        # With the library's initial weights every query gives nearly the same box.
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.normal_(0, 1.5 / weight[0].numel() ** 0.5)
    model.save_pretrained(folder)
    processor(kind).save_pretrained(folder)
    return model
