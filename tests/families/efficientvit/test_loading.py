"""EfficientViT-SAM's files load strictly, whatever else is refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ptq4sam.errors import CheckpointError, ConfigError
from ptq4sam.families import VARIANTS, build_sam
from ptq4sam.families.checkpoint import load_sam
from ptq4sam.families.efficientvit.variants import SIZES, build_variant
from ptq4sam.families.efficientvit.weights import fold_state
from ptq4sam.skeletons import shapes_alone
from tests.families.efficientvit.conftest import TINY, TINY_VARIANT, official_state


@pytest.fixture(scope="module")
def tiny_state() -> dict[str, Tensor]:
    """A published state dict, before its fold."""
    return official_state(build_variant("tiny_efficientvit", TINY, folded=False))


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "tiny_efficientvit", TINY_VARIANT)


def refusal(name: str, path: Path) -> str:
    """The message with which a file is refused: one line."""
    with pytest.raises(CheckpointError) as caught:
        load_sam(name, path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize("entry", [None, "state_dict"])
def test_published_files_load(
    tiny_state: dict[str, Tensor], tmp_path: Path, entry: str | None
) -> None:
    path = tmp_path / "tiny.pt"
    torch.save(tiny_state if entry is None else {entry: tiny_state}, path)
    sam = load_sam("tiny_efficientvit", path)
    assert not sam.training
    folded, found = fold_state(tiny_state), sam.state_dict()
    assert found.keys() == folded.keys()
    assert all(found[key].equal(folded[key]) for key in folded)
    assert not any(tensor.is_meta for tensor in (*sam.parameters(), *sam.buffers()))


def test_a_fold_keeps_every_tensor_but_norms(tiny_state: dict[str, Tensor]) -> None:
    folded = fold_state(tiny_state)
    lost = {key for key in tiny_state if key not in folded}
    assert {key.rpartition(".")[0].rpartition(".")[2] for key in lost} == {"norm"}
    # That of the whole encoder is none of a convolution.
    assert "image_encoder.norm.weight" in folded
    made = {key for key in folded if key not in tiny_state}
    assert {f"{key.rpartition('.norm.')[0]}.conv.bias" for key in lost} == made
    again = fold_state(folded)
    assert all(again[key].equal(value) for key, value in folded.items())


def test_another_variant_is_named(tmp_path: Path) -> None:
    with shapes_alone():
        states = {n: build_variant(n, SIZES[n], folded=False).state_dict() for n in SIZES}
    names = list(SIZES)
    for name, other in zip(names, names[1:] + names[:1], strict=True):
        few = {
            key: torch.zeros(1)
            for key in states[other]
            if key.endswith("conv.weight") or "prompt_encoder" in key or "mask_decoder" in key
        }
        path = tmp_path / f"{other}.pt"
        torch.save(few, path)
        assert f"looks like {other}: ask for that" in refusal(name, path)


def test_another_family_is_named(tiny_state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(tiny_state, tmp_path / "tiny.pt")
    assert "efficientvit_sam_l0" in refusal("mobile_sam", tmp_path / "tiny.pt")
    torch.save(build_sam("tiny_vit_nano").state_dict(), tmp_path / "nano.pt")
    assert "tiny_vit_nano" in refusal("efficientvit_sam_l0", tmp_path / "nano.pt")


JOIN = "image_encoder.neck.input_ops.1.op_list.0"


def _without_a_mean(state: dict[str, Tensor]) -> None:
    del state[f"{JOIN}.norm.running_mean"]


def _without_a_product(state: dict[str, Tensor]) -> None:
    del state["image_encoder.backbone.stages.4.op_list.1.context_module.main.aggreg.0.1.weight"]


def _not_finite(state: dict[str, Tensor]) -> None:
    state[f"{JOIN}.norm.running_var"] = state[f"{JOIN}.norm.running_var"] * float("nan")


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (_without_a_mean, f"{JOIN}.norm"),
        (_without_a_product, "aggreg.0.1"),
        (_not_finite, "not finite"),
    ],
)
def test_unfit_tensors_are_refused(
    tiny_state: dict[str, Tensor],
    tmp_path: Path,
    damage: Callable[[dict[str, Tensor]], None],
    part: str,
) -> None:
    state = dict(tiny_state)
    damage(state)
    torch.save(state, tmp_path / "tiny.pt")
    assert part in refusal("tiny_efficientvit", tmp_path / "tiny.pt")


def test_a_file_is_needed_and_says_where_from() -> None:
    with pytest.raises(CheckpointError, match=r"efficientvit_sam_xl1\.pt by ptq4sam download"):
        load_sam("efficientvit_sam_xl1")


def test_both_squares_follow_the_side() -> None:
    geometry = TINY_VARIANT.build(96).geometry
    assert (geometry.encoder_side, geometry.prompt_side) == (96, 192)
    assert geometry.features == ((32, 12, 12),)
    with pytest.raises(ConfigError, match="multiple of its last stage's 32"):
        TINY_VARIANT.build(80)
