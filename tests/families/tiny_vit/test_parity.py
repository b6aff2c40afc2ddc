"""The model computes what MobileSAM's program and timm's TinyViT compute."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from ptq4sam.families.tiny_vit.sizes import NANO, PUBLISHED, TinyViTSize
from ptq4sam.families.tiny_vit.variants import build_variant
from ptq4sam.families.tiny_vit.weights import fold_state
from ptq4sam.sam.model import Sam

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def mobile_sam(official_state: dict[str, Tensor]) -> Sam:
    sam = build_variant("mobile_sam", PUBLISHED)
    sam.load_state_dict(fold_state(official_state))
    return sam


@pytest.fixture(scope="module")
def embedding(mobile_sam: Sam, golden_input: Tensor, golden_model: Mapping[str, Tensor]) -> Tensor:
    """The golden input's embedding, every layer of which was compared."""
    encoder = mobile_sam.image_encoder
    behind = {"patch_embed": "patch_embed"} | {
        f"layers.{layer}.{last}": f"layer{layer}"
        for layer, last in enumerate([*["downsample"] * 3, "blocks.1.mlp"])
    }
    with torch.no_grad():
        state = encoder.begin(golden_input)
        for stage in encoder.stages():
            state = stage.run(state)
            name = behind.get(stage.name)
            if name is not None:
                check(state[0], name, golden_model)
    assert list(state[0].shape) == golden_model["embedding_shape"].tolist()
    check_values(state[0][0, ::32, ::8, ::8], golden_model["embedding_sample"])
    return state[0]


def check(found: Tensor, name: str, golden: Mapping[str, Tensor]) -> None:
    """Compare a map [1, dim, rows, columns] with what was recorded of it."""
    dim, rows, columns = found.shape[1:]
    if name == "patch_embed":
        sample = found[0, :: dim // 8, :: rows // 8, :: columns // 8]
    else:  # recorded as [1, tokens, dim]
        tokens = found.flatten(2).transpose(1, 2)
        assert list(tokens.shape) == golden[f"{name}_shape"].tolist()
        sample = tokens[0, ::256, ::16]
    check_values(sample, golden[f"{name}_sample"])
    mean, std, largest, size = golden[f"{name}_stats"].tolist()
    assert float(found.double().mean()) == pytest.approx(mean, abs=TOLERANCE)
    assert float(found.double().std()) == pytest.approx(std, abs=TOLERANCE)
    assert float(found.abs().max()) == pytest.approx(largest, abs=TOLERANCE)
    assert float(found.double().abs().mean()) == pytest.approx(size, abs=TOLERANCE)


def check_values(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


BOXES = torch.tensor([[100.0, 150, 600, 700], [512, 32, 1000, 420]])
POINTS = (torch.tensor([[[300.0, 400], [800, 200]]]), torch.tensor([[1.0, 0]]))


@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("kind", ["box", "point"])
def test_mobile_sam_equals_the_golden_one(
    mobile_sam: Sam,
    embedding: Tensor,
    golden_model: Mapping[str, Tensor],
    kind: str,
    multimask: bool,
) -> None:
    points, boxes = (None, BOXES) if kind == "box" else (POINTS, None)
    masks, ious = mobile_sam.decode((embedding,), points, boxes, None, multimask)
    name = f"{kind}_{'multi' if multimask else 'single'}"
    check_values(masks[:, :, ::16, ::16], golden_model[f"{name}_lowres_sample"])
    check_values(ious, golden_model[f"{name}_iou"])


def test_a_fold_leaves_the_output(
    mobile_sam: Sam, embedding: Tensor, official_state: dict[str, Tensor], golden_input: Tensor
) -> None:
    trained = build_variant("mobile_sam", PUBLISHED, folded=False)
    trained.load_state_dict(
        {name: v for name, v in official_state.items() if not name.startswith(CLASSIFIER)}
    )
    check_values(trained.image_encoder(golden_input), embedding)


CLASSIFIER = ("image_encoder.norm_head.", "image_encoder.head.")


def timm_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our encoder's state dict under timm's names, whose mergings begin the next layer."""
    renamed = {}
    for name, value in state.items():
        words = name.split(".")
        if words[0] == "neck":
            continue
        if words[0] == "layers":
            words[0] = "stages"
            if words[2] == "downsample":
                words[1] = str(int(words[1]) + 1)
        if words[:2] == ["patch_embed", "seq"]:
            words[1:3] = [{"0": "conv1", "2": "conv2"}[words[2]]]
        renamed[".".join("conv" if word == "c" else word for word in words)] = value
    return renamed


@pytest.mark.parametrize(("variant", "side"), [(PUBLISHED, 256), (NANO, 192)])
def test_encoder_equals_timms(variant: TinyViTSize, side: int) -> None:
    tiny_vit = pytest.importorskip(
        "timm.models.tiny_vit", reason="timm is not installed (the extra test has it)"
    )
    theirs = tiny_vit.TinyVit(
        embed_dims=variant.dims,
        depths=variant.depths,
        num_heads=(1, *variant.num_heads),
        window_sizes=(7, *variant.window_sizes),
        num_classes=0,
    ).eval()
    for stage, stride in enumerate(variant.strides, 1):
        theirs.stages[stage].downsample.conv2.conv.stride = (stride, stride)
    ours = build_variant("tiny", variant, folded=False).image_encoder
    generator = torch.Generator().manual_seed(0)
    state = {
        name: value
        if value.dim() == 0
        else trained_values(name, torch.randn(value.shape, generator=generator))
        for name, value in ours.state_dict().items()
    }
    ours.load_state_dict(state)
    missing, unknown = theirs.load_state_dict(timm_names(state), strict=False)
    assert not unknown
    assert all(name.startswith("head.") for name in missing), missing
    pixels = torch.randn(1, 3, side, side, generator=generator)
    x = ours.begin(pixels)
    for stage in ours.stages()[:-1]:
        x = stage.run(x)
    expected = theirs.forward_features(pixels)
    assert (x[0] - expected).abs().max() < TOLERANCE * expected.abs().max()


def trained_values(name: str, random: Tensor) -> Tensor:
    """Random numbers of the size that a tensor has in a trained model."""
    if name.endswith("running_var"):
        return 1 + 0.1 * random.abs()
    if name.endswith(("bias", "running_mean")):
        return 0.1 * random
    if name.endswith("weight"):
        return random / random[0].numel() ** 0.5 if random.dim() > 1 else 1 + 0.1 * random
    return random
