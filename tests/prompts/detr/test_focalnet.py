from __future__ import annotations

import re

import pytest
import torch

from ptq4sam.prompts.detr.focalnet import FocalNet, FocalNetConfig

SMALL = FocalNetConfig(dim=16, depths=(1, 2, 2, 1), focal_levels=3, focal_window=3)

_NAMES = (
    (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^embeddings\.norm", "patch_embed.norm"),
    (r"^encoder\.stages\.(\d+)\.layers", r"layers.\1.blocks"),
    (r"^encoder\.stages\.(\d+)\.downsample\.projection", r"layers.\1.downsample.proj"),
    (r"^encoder\.stages", "layers"),
    (r"modulation\.projection_in", "modulation.f"),
    (r"modulation\.projection_context", "modulation.h"),
    (r"modulation\.projection_out", "modulation.proj"),
)


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 96), (67, 90)])
def test_equals_focalnet_of_transformers(size: tuple[int, int]) -> None:
    pytest.importorskip("transformers")
    from transformers import FocalNetConfig as TheirConfig
    from transformers import FocalNetModel

    torch.manual_seed(0)
    config = TheirConfig(
        embed_dim=SMALL.dim,
        depths=list(SMALL.depths),
        focal_levels=[SMALL.focal_levels] * 4,
        focal_windows=[SMALL.focal_window] * 4,
        use_conv_embed=True,
        use_post_layernorm=True,
        use_layerscale=True,
        normalize_modulator=True,
    )
    theirs = FocalNetModel(config, add_pooling_layer=False).eval()
    for tensor in theirs.state_dict().values():
        tensor.normal_(0, 1.4 / tensor[0].numel() ** 0.5 if tensor.dim() > 1 else 0.5)
    ours = FocalNet(SMALL).eval()
    state = {}
    for name, tensor in theirs.state_dict().items():
        if name.startswith("layernorm."):
            continue
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        state[name] = tensor
    norms = {k: v for k, v in ours.state_dict().items() if re.match(r"norm\d\.", k)}
    assert len(norms) == 8
    ours.load_state_dict({**state, **norms})
    images = torch.randn(2, 3, *size)
    embedded, shape = theirs.embeddings(images)
    found = ours(images)
    for stage, feature in zip(theirs.encoder.stages, found, strict=True):
        embedded, kept, (*_, height, width) = stage(embedded, shape)
        expected = kept.unflatten(1, shape).permute(0, 3, 1, 2)
        # Our features have one norm more, which starts as (x - mean) / deviation.
        normed = torch.nn.functional.layer_norm(expected.permute(0, 2, 3, 1), expected.shape[1:2])
        assert (feature.permute(0, 2, 3, 1) - normed).abs().max() < 1e-4
        shape = (height, width)


@torch.no_grad()
def test_features_have_a_norm_of_their_own() -> None:
    torch.manual_seed(0)
    model = FocalNet(SMALL).eval()
    images = torch.randn(1, 3, 64, 64)
    before = model(images)
    assert [tuple(x.shape[1:]) for x in before] == [
        (16, 16, 16),
        (32, 8, 8),
        (64, 4, 4),
        (128, 2, 2),
    ]
    model.get_submodule("norm1").bias.add_(1.0)
    after = model(images)
    assert torch.allclose(after[1], before[1] + 1)
    assert all(torch.equal(after[place], before[place]) for place in (0, 2, 3))
