"""The models compute what the published program and timm's backbone compute."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ptq4sam.families.efficientvit.sizes import L0, L1, L2, EfficientViTSize
from ptq4sam.families.efficientvit.variants import PUBLISHED, build_variant
from ptq4sam.families.efficientvit.weights import fold_state
from ptq4sam.sam.model import Sam
from ptq4sam.sam.predictor import Predictor
from ptq4sam.skeletons import shapes_alone
from tests.families.efficientvit.conftest import GOLDEN, golden, official_state

TOLERANCE = 2e-5


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_names_shapes_and_types_are_the_published_ones(name: str) -> None:
    with shapes_alone():
        state = build_variant(name, PUBLISHED[name], folded=False).state_dict()
    lines = [
        f"{key} {'x'.join(map(str, value.shape)) or 'scalar'} {str(value.dtype)[6:]}"
        for key, value in state.items()
    ]
    published = json.loads((GOLDEN / "lists.json").read_text())[name]
    assert len(lines) == published["keys"]
    assert hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest() == published["keys_sha256"]


@cache
def model(name: str) -> tuple[Sam, Mapping[str, Tensor]]:
    """A folded SAM with weights by the rule, and what the published program gives."""
    with shapes_alone():
        shapes = build_variant(name, PUBLISHED[name], folded=False)
        sam = build_variant(name, PUBLISHED[name])
    sam.load_state_dict(fold_state(official_state(shapes)), assign=True)
    real = sam.normalized_by(sam.normalization).eval()
    return real, golden(name)


@cache
def embedding(name: str) -> Tensor:
    """The golden input's, every stage of which was compared."""
    sam, expected = model(name)
    side = sam.image_size
    x = np.random.RandomState(1234).standard_normal((1, 3, side, side)).astype(np.float32)
    encoder = sam.image_encoder
    stages = encoder.stages()
    ends: dict[str, str] = {}
    for stage in stages[:-1]:
        words = stage.name.split(".")
        ends["neck" if words[0] == "neck" else f"stage{words[2]}"] = stage.name
    behind = {last: part for part, last in ends.items()}
    with torch.no_grad():
        state = encoder.begin(torch.from_numpy(x))
        for stage in stages:
            state = stage.run(state)
            if stage.name in behind:
                check(state[0], behind[stage.name], expected)
    assert len(behind) == len(PUBLISHED[name].widths) + 1
    assert len(state) == 1
    assert list(state[0].shape) == expected["embedding_shape"].tolist()
    check_values(state[0][0, ::32, ::8, ::8], expected["embedding_sample"])
    check_numbers(state[0], expected["embedding_stats"])
    return state[0]


def check(found: Tensor, name: str, expected: Mapping[str, Tensor]) -> None:
    """Compare a map with what was recorded of it."""
    dim, rows, columns = found.shape[1:]
    sample = found[0, :: dim // 8, :: rows // 8, :: columns // 8]
    # Before the last norm numbers are as large as 17.
    tolerance = TOLERANCE * max(1.0, float(found.abs().max()) / 8)
    torch.testing.assert_close(sample, expected[f"{name}_sample"], atol=tolerance, rtol=0)
    check_numbers(found, expected[f"{name}_stats"])


def check_numbers(found: Tensor, expected: Tensor) -> None:
    values = found.double()
    numbers = torch.stack([values.mean(), values.std(), values.abs().max(), values.abs().mean()])
    check_values(numbers, expected)


def check_values(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


BOXES = torch.tensor([[100.0, 150, 600, 700], [512, 32, 1000, 420]])
POINTS = (torch.tensor([[[300.0, 400], [800, 200]]]), torch.tensor([[1.0, 0]]))


@pytest.mark.parametrize("name", ["efficientvit_sam_l0", "efficientvit_sam_xl0"])
def test_a_sam_equals_the_golden_one(name: str) -> None:
    sam, expected = model(name)
    features = (embedding(name),)
    for kind, points, boxes in (("box", None, BOXES), ("point", POINTS, None)):
        for multimask, each in ((True, "multi"), (False, "single")):
            masks, ious = sam.decode(features, points, boxes, None, multimask)
            check_values(masks[:, :, ::16, ::16], expected[f"{kind}_{each}_lowres_sample"])
            check_numbers(masks, expected[f"{kind}_{each}_lowres_stats"])
            check_values(ious, expected[f"{kind}_{each}_iou"])


def test_mistakes_would_be_seen() -> None:
    """Other eps and another GELU move outputs by more than the tolerance."""
    _, expected = model("efficientvit_sam_l0")
    for mistake in ("decoder_ln_eps_1e5", "bn_eps_1e5", "gelu_erf"):
        assert expected[f"wrong_{mistake}_maxdiff"] > 3 * TOLERANCE
    sam = model("efficientvit_sam_l0")[0]
    norms = [m for m in sam.modules() if isinstance(m, nn.LayerNorm)]
    assert norms
    assert {norm.eps for norm in norms} == {1e-6}


def test_the_predictor_places_prompts_in_their_own_square() -> None:
    sam, expected = model("efficientvit_sam_l0")
    predictor = Predictor(sam)
    image = np.random.RandomState(7).randint(0, 256, (300, 400, 3)).astype(np.uint8)
    pixels = predictor.pixels(image)
    assert list(pixels.shape[1:]) == expected["pred_input_shape"].tolist() == [3, 512, 512]
    check_values(pixels[0, :, ::32, ::32], expected["pred_input_sample"])
    predictor.set_image(image)
    found = predictor.embedding
    assert list(found.input_size) == expected["pred_input_size"].tolist() == [768, 1024]
    check_values(found.features[0, ::32, ::8, ::8], expected["pred_features_sample"])
    prediction = predictor.predict(boxes=[[40, 60, 300, 250]], multimask=True)
    check_values(prediction.low_res[0, :, ::16, ::16], expected["pred_lowres_sample"])
    check_values(prediction.iou_predictions[0], expected["pred_iou"])
    logits = predictor.full_resolution(prediction.low_res)
    check_values(logits[0, :, ::20, ::20], expected["pred_mask_logits_sample"])


def timm_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our backbone's state dict under timm's names, which have a stem before the stages."""
    renamed = {}
    for name, value in state.items():
        words = name.removeprefix("stages.").split(".")
        stage, block, rest = int(words[0]), int(words[2]), words[3:]
        if stage:
            where = ["stages", str(stage - 1), "blocks", str(block)]
        else:
            where = ["stem", f"res{block - 1}" if block else "in_conv"]
        renamed[".".join(where + rest)] = value
    return renamed


@pytest.mark.parametrize("size", [L0, L1, L2])
def test_backbone_equals_timms(size: EfficientViTSize) -> None:
    theirs_of = pytest.importorskip(
        "timm.models.efficientvit_mit", reason="timm is not installed (the extra test has it)"
    )
    with shapes_alone():
        theirs = theirs_of.EfficientVitLarge(
            widths=size.widths, depths=size.depths, head_dim=32, norm_eps=1e-6, head_widths=(8, 8)
        )
        ours = build_variant("any", size, folded=False).image_encoder.backbone
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.zeros((), dtype=torch.int64)
        if value.dim() == 0
        else of_training(name, torch.randn(value.shape, generator=generator))
        for name, value in ours.state_dict().items()
    }
    theirs.load_state_dict(timm_names(state), assign=True, strict=False)
    ours.load_state_dict(state, assign=True)
    for module in theirs.modules():
        if isinstance(module, theirs_of.LiteMLA):
            module.eps = 1e-15
    pixels = torch.randn(1, 3, 64, 64, generator=generator)
    expected = theirs.eval().forward_features(pixels)
    x: tuple[Tensor, ...] = (pixels,)
    for blocks in ours.eval().stages:
        for stage in blocks.stages():
            x = stage.run(x)
    assert (x[0] - expected).abs().max() < TOLERANCE * expected.abs().max()


def of_training(name: str, random: Tensor) -> Tensor:
    """Random numbers of the size that a tensor has in a trained model."""
    if name.endswith("running_var"):
        return 1 + 0.1 * random.abs()
    if name.endswith(("bias", "running_mean")):
        return 0.1 * random
    return random / random[0].numel() ** 0.5 if random.dim() > 1 else 1 + 0.1 * random
