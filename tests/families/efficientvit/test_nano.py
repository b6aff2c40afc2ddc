"""efficientvit_sam_nano can learn from vit_nano: small, of the same embeddings and prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ptq4sam.errors import CheckpointError
from ptq4sam.families import build_sam, variant_of
from ptq4sam.families.checkpoint import load_sam
from ptq4sam.families.efficientvit.weights import fold_state
from ptq4sam.skeletons import shapes_alone

NAME = "efficientvit_sam_nano"


def test_it_is_small_and_has_its_teachers_shapes() -> None:
    with shapes_alone():
        sam, teacher = build_sam(NAME), build_sam("vit_nano")
    assert sum(value.numel() for value in sam.state_dict().values()) * 2 <= 8e6
    assert sam.geometry == teacher.geometry
    assert sam.geometry.features == ((128, 32, 32),)
    for part in ("prompt_encoder", "mask_decoder"):
        ours, theirs = (getattr(each, part).state_dict() for each in (sam, teacher))
        assert {n: v.shape for n, v in ours.items()} == {n: v.shape for n, v in theirs.items()}


def test_pictures_of_any_multiple_of_its_stride() -> None:
    sam = build_sam(NAME, 64).eval()
    with torch.no_grad():
        (features,) = sam.embed(torch.randn(1, 3, 64, 64))
    assert features.shape == (1, 128, 8, 8)
    assert bool(features.isfinite().all())
    # A normalised embedding, as the teacher's.
    torch.testing.assert_close(features.mean(1), torch.zeros(1, 8, 8), atol=1e-5, rtol=0)


def test_every_kind_of_block_of_the_published_ones_is_in_it() -> None:
    sam, published = (build_on_meta(name) for name in (NAME, "efficientvit_sam_l0"))

    def kinds(model: torch.nn.Module) -> set[str]:
        found = (model.description.address_of(path) for path, _ in model.named_modules())
        return {address.kind for address in found if address is not None}

    assert kinds(sam) == kinds(published)


def build_on_meta(name: str) -> torch.nn.Module:
    with shapes_alone():
        return build_sam(name)


def test_its_weights_ship_with_their_normalisations() -> None:
    """The study's simulation does not fold them."""
    model, unfolded = load_sam(NAME), load_sam(NAME, folded=False)
    image = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        (found,), (expected,) = model.embed(image), unfolded.embed(image)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert variant_of(NAME).weights.embedded.stat().st_size <= 8e6
    with pytest.raises(CheckpointError, match="train them by ptq4sam distil"):
        load_sam(f"{NAME}:neck_depth=2")


def test_a_trained_file_loads(tmp_path: Path) -> None:
    unfolded = build_sam(NAME, folded=False)
    torch.save(unfolded.state_dict(), tmp_path / "nano.pt")
    found = load_sam(NAME, tmp_path / "nano.pt").state_dict()
    folded = fold_state(unfolded.state_dict())
    assert all(found[name].equal(value) for name, value in folded.items())
    with pytest.raises(CheckpointError, match=f"looks like {NAME}: ask for that"):
        load_sam("efficientvit_sam_l0", tmp_path / "nano.pt")
