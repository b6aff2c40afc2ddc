"""H-Deformable-DETR beside Deformable DETR of transformers, which has no mixed selection."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ptq4sam.prompts.detr.hdetr import HDetr, HDetrConfig

SMALL = HDetrConfig(
    depths=(1, 1, 1, 1),
    dim=64,
    ffn=48,
    layers=3,
    heads=4,
    points=3,
    classes=91,
    queries=25,
    training_queries=7,
    mixed_selection=False,
)

_NAMES = (
    (r"^model\.(backbone\.model|input_proj|level_embed|enc_output|pos_trans)", r"\1"),
    (r"^model\.(encoder|decoder)\.", r"transformer.\1."),
    (r"^(level_embed|enc_output|pos_trans)", r"transformer.\1"),
    (r"^backbone\.model\.embedder\.embedder\.", "backbone.0.body.0."),
    (r"^backbone\.model\.encoder\.stages\.(\d)\.layers\.", r"backbone.0.body.layer\1."),
    (r"body\.0\.convolution", "body.conv1"),
    (r"body\.0\.normalization", "body.bn1"),
    (r"shortcut\.convolution", "downsample.0"),
    (r"shortcut\.normalization", "downsample.1"),
    (r"\.layer\.(\d)\.convolution", r".conv\1"),
    (r"\.layer\.(\d)\.normalization", r".bn\1"),
    (r"(encoder\.layers\.\d+)\.self_attn_layer_norm", r"\1.norm1"),
    (r"(encoder\.layers\.\d+)\.final_layer_norm", r"\1.norm2"),
    (r"(decoder\.layers\.\d+)\.self_attn_layer_norm", r"\1.norm2"),
    (r"(decoder\.layers\.\d+)\.encoder_attn_layer_norm", r"\1.norm1"),
    (r"(decoder\.layers\.\d+)\.final_layer_norm", r"\1.norm3"),
    (r"\.encoder_attn\.", ".cross_attn."),
    (r"\.mlp\.fc", ".linear"),
    (r"\.self_attn\.o_proj\.", ".self_attn.out_proj."),
)


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of transformers' Deformable DETR under the names of the authors."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith(("model.decoder.class_embed", "model.decoder.bbox_embed")):
            continue
        short = name
        for pattern, replacement in _NAMES:
            short = re.sub(pattern, replacement, short)
        # Stages and convolutions count from 1.
        short = re.sub(
            r"(body\.layer|\.conv|\.bn)(\d)(?=\.)",
            lambda hit: f"{hit[1]}{int(hit[2]) + 1}",
            short.replace("body.conv1.", "body.conv0.").replace("body.bn1.", "body.bn0."),
        )
        found[short] = tensor
    for kind in ("weight", "bias"):
        for name in [n for n in found if n.endswith(f"self_attn.q_proj.{kind}")]:
            parts = [found.pop(name.replace("q_proj", f"{x}_proj")) for x in "qkv"]
            found[name.replace(f"q_proj.{kind}", f"in_proj_{kind}")] = torch.cat(parts)
    return found


@pytest.fixture(scope="module")
def theirs() -> Any:
    pytest.importorskip("transformers")
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(
        embedding_size=64,
        hidden_sizes=[256, 512, 1024, 2048],
        depths=list(SMALL.depths),
        layer_type="bottleneck",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = DeformableDetrConfig(
        backbone_config=backbone,
        d_model=SMALL.dim,
        encoder_ffn_dim=SMALL.ffn,
        decoder_ffn_dim=SMALL.ffn,
        encoder_layers=SMALL.layers,
        decoder_layers=SMALL.layers,
        encoder_attention_heads=SMALL.heads,
        decoder_attention_heads=SMALL.heads,
        encoder_n_points=SMALL.points,
        decoder_n_points=SMALL.points,
        num_feature_levels=SMALL.levels,
        two_stage=True,
        with_box_refine=True,
        two_stage_num_proposals=SMALL.queries,
        id2label={place: str(place) for place in range(SMALL.classes)},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DeformableDetrForObjectDetection(config).eval()
        with torch.no_grad():
            for tensor in {id(t): t for t in model.state_dict().values()}.values():
                if tensor.dim() > 1:
                    tensor.normal_(0, 1.4 / tensor[0].numel() ** 0.5)
                else:
                    tensor.add_(torch.rand_like(tensor) * 0.2)
    return model


@torch.no_grad()
@pytest.mark.parametrize("size", [(96, 128), (131, 77)])
def test_equals_deformable_detr_of_transformers(theirs: Any, size: tuple[int, int]) -> None:
    ours = HDetr(SMALL).eval()
    ours.load_state_dict(convert(theirs.state_dict()))
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(3))
    expected = theirs(images)
    scores, boxes = ours(images)
    assert scores.shape == (2, SMALL.queries, SMALL.classes)
    assert (scores - expected.logits).abs().max() < 1e-4
    assert (boxes - expected.pred_boxes).abs().max() < 1e-4
    assert boxes.std(dim=1).min() > 0.01


@torch.no_grad()
def test_mixed_selection_changes_what_queries_start_from_and_nothing_else(theirs: Any) -> None:
    """With the content that proposals would have given, the answer is the same."""
    plain = HDetr(SMALL).eval()
    plain.load_state_dict(convert(theirs.state_dict()))
    mixed = HDetr(replace(SMALL, mixed_selection=True)).eval()
    state = plain.state_dict()
    state["query_embed.weight"] = torch.randn(32, SMALL.dim)
    mixed.load_state_dict(state)
    images = torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(3))
    seen: list[Tensor] = []
    first = plain.transformer.decoder.layers[0]
    hook = first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    scores, boxes = plain(images)
    hook.remove()
    assert not torch.allclose(mixed(images)[0], scores, atol=1e-3)
    mixed.query_embed.weight[: SMALL.queries] = seen[0][0]
    mixed.query_embed.weight[SMALL.queries :] = torch.nan
    again = mixed(images)
    assert (again[0] - scores).abs().max() < 1e-5
    assert (again[1] - boxes).abs().max() < 1e-5


@torch.no_grad()
def test_a_small_picture_has_fewer_queries() -> None:
    torch.manual_seed(0)
    model = HDetr(replace(SMALL, mixed_selection=True)).eval()
    scores, boxes = model(torch.randn(1, 3, 32, 32))
    assert scores.shape == (1, 16 + 4 + 1 + 1, SMALL.classes)
    assert boxes.isfinite().all()
