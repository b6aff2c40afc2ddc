from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ptq4sam.prompts.detr.dino import DinoConfig, FocalNetDino
from ptq4sam.prompts.detr.focalnet import FocalNet, FocalNetConfig

SMALL = DinoConfig(
    backbone=FocalNetConfig(dim=8, depths=(1, 1, 1, 1), focal_levels=2),
    dim=256,  # mmdet's positions of queries know no other
    ffn=48,
    layers=3,
    heads=4,
    points=3,
    queries=30,
)

_NAMES = (
    (r"^backbone\.0\.", "backbone.body."),
    (r"^transformer\.", ""),
    (r"^input_proj\.4\.0", "neck.extra_convs.0.conv"),
    (r"^input_proj\.4\.1", "neck.extra_convs.0.gn"),
    (r"^input_proj\.(\d)\.0", r"neck.convs.\1.conv"),
    (r"^input_proj\.(\d)\.1", r"neck.convs.\1.gn"),
    (r"^tgt_embed", "query_embedding"),
    (r"^enc_output_norm", "memory_trans_norm"),
    (r"^enc_output", "memory_trans_fc"),
    (r"(decoder\.layers\.\d\.self_attn)", r"\1.attn"),
    (r"(encoder\.layers\.\d)\.norm1", r"\1.norms.0"),
    (r"(encoder\.layers\.\d)\.norm2", r"\1.norms.1"),
    (r"(decoder\.layers\.\d)\.norm2", r"\1.norms.0"),
    (r"(decoder\.layers\.\d)\.norm1", r"\1.norms.1"),
    (r"(decoder\.layers\.\d)\.norm3", r"\1.norms.2"),
    (r"(coder\.layers\.\d)\.linear1", r"\1.ffn.layers.0.0"),
    (r"(coder\.layers\.\d)\.linear2", r"\1.ffn.layers.1"),
)


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the names of mmdet's DINO, whose layers have a head each."""
    found = {}
    for name, tensor in state.items():
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        first = name.startswith("enc_out_")
        head = re.match(r"(?:enc_out_)?(class|bbox)_embed\.(?:layers\.(\d)\.)?(\w+)$", name)
        if head is None:
            found[name] = tensor
            continue
        kind, place, tail = head.groups()
        branch = f"cls_branches.{{}}.{tail}"
        if kind == "bbox":
            branch = f"reg_branches.{{}}.{2 * int(place)}.{tail}"
        for layer in [SMALL.layers] if first else range(SMALL.layers):
            found["bbox_head." + branch.format(layer)] = tensor
    return found


class _Body(nn.Module):
    """Our backbone where mmdet expects one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = FocalNet(SMALL.backbone)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.body(images))


def _mmdet_dino() -> Any:
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    register_all_modules()
    attention = {"embed_dims": SMALL.dim, "num_levels": SMALL.levels, "num_heads": SMALL.heads}
    deformable = dict(**attention, num_points=SMALL.points, dropout=0.0)
    feed = {"embed_dims": SMALL.dim, "feedforward_channels": SMALL.ffn, "ffn_drop": 0.0}
    among = {"embed_dims": SMALL.dim, "num_heads": SMALL.heads, "dropout": 0.0}
    loss = {"type": "FocalLoss", "use_sigmoid": True}
    config = {
        "type": "DINO",
        "num_queries": SMALL.queries,
        "with_box_refine": True,
        "as_two_stage": True,
        "num_feature_levels": SMALL.levels,
        "backbone": {"type": "ResNet", "depth": 18, "out_indices": (0, 1, 2, 3)},
        "neck": {
            "type": "ChannelMapper",
            "in_channels": list(SMALL.backbone.channels),
            "kernel_size": 1,
            "out_channels": SMALL.dim,
            "act_cfg": None,
            "bias": True,
            "norm_cfg": {"type": "GN", "num_groups": 32},
            "num_outs": SMALL.levels,
        },
        "encoder": {
            "num_layers": SMALL.layers,
            "layer_cfg": {"self_attn_cfg": deformable, "ffn_cfg": feed},
        },
        "decoder": {
            "num_layers": SMALL.layers,
            "return_intermediate": True,
            "layer_cfg": {"self_attn_cfg": among, "cross_attn_cfg": deformable, "ffn_cfg": feed},
            "post_norm_cfg": None,
        },
        "positional_encoding": {
            "num_feats": SMALL.dim // 2,
            "normalize": True,
            "offset": 0.0,
            "temperature": 20,
        },
        "bbox_head": {
            "type": "DINOHead",
            "num_classes": SMALL.classes,
            "embed_dims": SMALL.dim,
            "sync_cls_avg_factor": True,
            "loss_cls": loss,
        },
        "dn_cfg": {
            "label_noise_scale": 0.5,
            "box_noise_scale": 1.0,
            "group_cfg": {"dynamic": True, "num_groups": None, "num_dn_queries": 10},
        },
    }
    model = MODELS.build(config)
    model.backbone = _Body()
    return model.eval()


def _random(seed: int) -> FocalNetDino:
    torch.manual_seed(seed)
    model = FocalNetDino(SMALL).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 1 / weight[0].numel() ** 0.5)
            else:
                weight.add_(torch.rand_like(weight) * 0.2)
    return model


@torch.no_grad()
@pytest.mark.parametrize("size", [(128, 160), (99, 131)])
def test_equals_dino_of_mmdet(size: tuple[int, int]) -> None:
    pytest.importorskip("mmdet")
    from mmdet.structures import DetDataSample

    ours, theirs = _random(0), _mmdet_dino()
    state = convert(ours.state_dict())
    state |= {k: v for k, v in theirs.state_dict().items() if k.startswith("dn_query_generator.")}
    theirs.load_state_dict(state)
    # In float32 the roundings of the first layers grow to some 1e-4 in the last.
    ours, theirs = ours.double(), theirs.double()
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(3)).double()
    samples = [DetDataSample(metainfo={"img_shape": size, "batch_input_shape": size})] * 2
    expected = theirs(images, samples, mode="tensor")
    scores, boxes = ours(images)
    assert (scores.sigmoid() - expected[0][-1].sigmoid()).abs().max() < 1e-4
    assert (boxes - expected[1][-1]).abs().max() < 1e-4
    assert boxes.std(dim=1).min() > 0.01


@torch.no_grad()
def test_positions_of_queries_are_sines_of_their_boxes() -> None:
    model = _random(1)
    model.transformer.decoder.ref_point_head = nn.Identity()
    box = [0.1, 0.2, 0.3, 0.4]
    found = model._positions(torch.tensor([[box]]))[0, 0]
    each = SMALL.dim // 2
    expected = []
    for value in (box[1], box[0], box[2], box[3]):
        for pair in range(each // 2):
            angle = value * 2 * math.pi / 10_000 ** (2 * pair / each)
            expected += [math.sin(angle), math.cos(angle)]
    assert torch.allclose(found, torch.tensor(expected), atol=1e-6)


@torch.no_grad()
def test_answers_are_read_off_normed_queries_and_passed_on_off_plain_ones() -> None:
    """With a norm that gives zeros, scores and last steps are the heads' biases."""
    model = _random(2)
    model.transformer.decoder.norm.weight.zero_()
    model.transformer.decoder.norm.bias.zero_()
    images = torch.randn(1, 3, 128, 128)
    scores, boxes = model(images)
    assert torch.allclose(scores, model.class_embed.bias.expand_as(scores))
    assert boxes.std(dim=1).max() > 0.01


@torch.no_grad()
def test_a_small_picture_has_fewer_queries() -> None:
    scores, boxes = _random(0)(torch.randn(1, 3, 16, 16))
    assert scores.shape == (1, 16 + 4 + 1 + 1 + 1, SMALL.classes)
    assert boxes.isfinite().all()
