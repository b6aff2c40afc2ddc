"""Our SAM computes what segment-anything and transformers compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ptq4sam.families.checkpoint import load_sam
from ptq4sam.families.sam_vit.sizes import SIZES, SamVariant
from ptq4sam.families.sam_vit.variants import build_variant
from ptq4sam.sam.model import Sam

TOLERANCE = 1e-4  # of the largest magnitude
ALL_CASES = ("box", "points", "one point", "mask", "box and points", "all")
MAIN_CASES = ("box", "one point", "mask", "all")
FEW_CASES = ("box and points",)
# SamModel cannot do without a sparse prompt.
SAM_MODEL_CASES = ("box", "points", "one point", "box and points", "all")

# The second block is global; at 1024 px the first pads its grid of 64 to windows of 70.
CUT = {name: replace(SIZES[name], depth=2, global_attn_indexes=(1,)) for name in ("vit_l", "vit_h")}
# All of its blocks, which see a quarter of the pixels.
VIT_B = replace(SIZES["vit_b"], image_size=512)


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def picture(variant: SamVariant) -> Tensor:
    """Three quarters as high as wide, so that the padding counts."""
    size = (1, 3, variant.image_size * 3 // 4, variant.image_size)
    return torch.randint(0, 256, size, generator=torch.Generator().manual_seed(2)).float()


def decode(sam: Sam, features: Tensor, case: dict[str, Tensor], multimask: bool) -> Any:
    points = (case["points"], case["labels"]) if "points" in case else None
    sparse, dense = sam.prompt_encoder(points, case.get("boxes"), case.get("masks"))
    positions = sam.prompt_encoder.dense_positions()
    return sam.mask_decoder(features, positions, sparse, dense, multimask)


def decode_by_reference(
    reference: Any, features: Tensor, case: dict[str, Tensor], multimask: bool
) -> Any:
    points = (case["points"], case["labels"]) if "points" in case else None
    sparse, dense = reference.prompt_encoder(points, case.get("boxes"), case.get("masks"))
    positions = reference.prompt_encoder.get_dense_pe()
    return reference.mask_decoder(features, positions, sparse, dense, multimask)


def decode_by_sam_model(
    model: Any, features: Tensor, case: dict[str, Tensor], multimask: bool
) -> Any:
    if "masks" in case and len(case["masks"]) > 1:
        # SamModel takes one mask an image, not one a prompt.
        each = [
            decode_by_sam_model(
                model, features, {k: v[i : i + 1] for k, v in case.items()}, multimask
            )
            for i in range(len(case["masks"]))
        ]
        masks, ious = zip(*each, strict=True)
        return torch.cat(masks), torch.cat(ious)
    inputs = {
        "input_points": case["points"][None] if "points" in case else None,
        "input_labels": case["labels"][None] if "points" in case else None,
        "input_boxes": case["boxes"][None] if "boxes" in case else None,
        "input_masks": case.get("masks"),
    }
    output = model(image_embeddings=features, multimask_output=multimask, **inputs)
    return output.pred_masks[0], output.iou_scores[0]


@dataclass(frozen=True)
class VitB:
    """A ViT-B that went through a SamModel directory, and its embedding of one picture."""

    theirs: Any
    ours: Sam
    features: Tensor


@pytest.fixture(scope="module")
def vit_b(
    tmp_path_factory: pytest.TempPathFactory, sam_model: Callable[[SamVariant], Any]
) -> Iterator[VitB]:
    directory = tmp_path_factory.mktemp("sam-vit-base")
    theirs = sam_model(VIT_B)
    theirs.save_pretrained(directory)
    ours = load_sam("vit_b", directory)
    with torch.no_grad():
        features = ours.image_encoder(ours.preprocess(picture(VIT_B)))
    yield VitB(theirs, ours, features)
    for file in directory.iterdir():
        file.unlink()


def check_decoding(
    ours: Callable[..., Any],
    theirs: Callable[..., Any],
    variant: SamVariant,
    names: tuple[str, ...],
    prompts: Callable[[int, int], dict[str, dict[str, Any]]],
    error_of: Callable[[Tensor, Tensor], float],
) -> None:
    cases = prompts(variant.image_size, variant.image_size // variant.patch_size)
    for name in names:
        masks, ious = both_modes(ours, cases[name])
        their_masks, their_ious = both_modes(theirs, cases[name])
        assert masks.shape[:2] == ious.shape
        assert error_of(masks, their_masks) < TOLERANCE, name
        assert error_of(ious, their_ious) < TOLERANCE, name


def both_modes(decoder: Callable[..., Any], case: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The single mask and the three, joined, since a lone IoU near 0 has no magnitude."""
    single_masks, single_ious = decoder(case, False)
    masks, ious = decoder(case, True)
    return torch.cat([single_masks, masks], dim=1), torch.cat([single_ious, ious], dim=1)


# Before those of ViT-B, whose models stay in memory.
@pytest.mark.parametrize("name", ["vit_nano", "vit_l", "vit_h"])
def test_variant_equals_segment_anything(
    name: str,
    reference_sam: Callable[[SamVariant], nn.Module],
    random_state: Callable[..., dict[str, Tensor]],
    prompts_of_every_kind: Any,
    error_of: Any,
) -> None:
    variant = CUT.get(name, SIZES[name])
    ours, reference = build_variant(name, variant), reference_sam(variant)
    state = random_state(reference.state_dict())
    ours.load_state_dict(state)
    reference.load_state_dict(state)
    pixels: Any = picture(variant)
    ours_in, reference_in = ours.preprocess(pixels), reference.preprocess(pixels)
    assert ours_in.equal(reference_in)
    features, theirs = ours.image_encoder(ours_in), reference.image_encoder(reference_in)
    assert error_of(features, theirs) < TOLERANCE
    check_decoding(
        lambda case, multimask: decode(ours, features, case, multimask),
        lambda case, multimask: decode_by_reference(reference, theirs, case, multimask),
        variant,
        ALL_CASES if name == "vit_nano" else FEW_CASES,
        prompts_of_every_kind,
        error_of,
    )


# Generous, since a loaded machine takes several times as long.
@pytest.mark.timeout(900)
def test_vit_b_equals_segment_anything(
    vit_b: VitB,
    reference_sam: Callable[[SamVariant], Any],
    prompts_of_every_kind: Any,
    error_of: Any,
) -> None:
    variant = VIT_B
    reference = reference_sam(variant)
    reference.load_state_dict(vit_b.ours.state_dict())
    features = reference.image_encoder(reference.preprocess(picture(variant)))
    assert error_of(vit_b.features, features) < TOLERANCE
    check_decoding(
        lambda case, multimask: decode(vit_b.ours, vit_b.features, case, multimask),
        lambda case, multimask: decode_by_reference(reference, features, case, multimask),
        variant,
        MAIN_CASES,
        prompts_of_every_kind,
        error_of,
    )


@pytest.mark.timeout(900)
def test_vit_b_equals_sam_model(vit_b: VitB, prompts_of_every_kind: Any, error_of: Any) -> None:
    variant = VIT_B
    features = vit_b.theirs.get_image_embeddings(vit_b.ours.preprocess(picture(variant)))
    assert error_of(vit_b.features, features) < TOLERANCE
    check_decoding(
        lambda case, multimask: decode(vit_b.ours, vit_b.features, case, multimask),
        lambda case, multimask: decode_by_sam_model(vit_b.theirs, features, case, multimask),
        variant,
        FEW_CASES,
        prompts_of_every_kind,
        error_of,
    )


def test_nano_equals_sam_model(
    sam_model: Callable[[SamVariant], Any],
    tmp_path: Path,
    prompts_of_every_kind: Any,
    error_of: Any,
) -> None:
    variant = SIZES["vit_nano"]
    theirs = sam_model(variant)
    theirs.save_pretrained(tmp_path)
    ours = load_sam("vit_nano", tmp_path)
    pixels = ours.preprocess(picture(variant))
    features, their_features = ours.image_encoder(pixels), theirs.get_image_embeddings(pixels)
    assert error_of(features, their_features) < TOLERANCE
    check_decoding(
        lambda case, multimask: decode(ours, features, case, multimask),
        lambda case, multimask: decode_by_sam_model(theirs, their_features, case, multimask),
        variant,
        SAM_MODEL_CASES,
        prompts_of_every_kind,
        error_of,
    )
