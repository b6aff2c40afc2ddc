"""MobileSAM's and TinySAM's files load strictly, whatever else is refused in one line."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ptq4sam.errors import CheckpointError, ConfigError
from ptq4sam.families import VARIANTS, build_sam
from ptq4sam.families.checkpoint import load_sam
from ptq4sam.families.tiny_vit.sizes import NANO
from ptq4sam.families.tiny_vit.variants import build_variant
from ptq4sam.families.tiny_vit.weights import fold_state

CLASSIFIER = ("image_encoder.norm_head.", "image_encoder.head.")


@pytest.fixture(scope="module")
def nano_state() -> dict[str, Tensor]:
    """A trained tiny_vit_nano, before its fold."""
    torch.manual_seed(0)
    return build_variant("tiny_vit_nano", NANO, folded=False).state_dict()


def refusal(name: str, path: Path) -> str:
    """The message with which a file is refused: one line."""
    with pytest.raises(CheckpointError) as caught:
        load_sam(name, path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize("name", ["mobile_sam", "tinysam"])
@pytest.mark.parametrize("entry", [None, "model"])
def test_published_files_load(
    official_state: dict[str, Tensor], tmp_path: Path, name: str, entry: str | None
) -> None:
    path = tmp_path / VARIANTS[name].weights.file
    torch.save(official_state if entry is None else {entry: official_state}, path)
    sam = load_sam(name, path)
    assert sam.name == name
    assert not sam.training
    folded, found = fold_state(official_state), sam.state_dict()
    assert found.keys() == folded.keys()
    assert all(found[key].equal(folded[key]) for key in folded)
    # All that a forward needs is real, though the model is built without memory.
    assert not any(tensor.is_meta for tensor in (*sam.parameters(), *sam.buffers()))


def test_a_fold_keeps_every_tensor_but_norms_and_classifier(
    official_state: dict[str, Tensor],
) -> None:
    folded = fold_state(official_state)
    lost = {key for key in official_state if key not in folded}
    assert all(".bn." in key or key.startswith(CLASSIFIER) for key in lost)
    assert sum(key.endswith(".bn.weight") for key in lost) == sum(
        key.endswith(".c.bias") for key in folded
    )
    assert sum(value.numel() for value in folded.values()) < 10_130_092 - 321_640
    again = fold_state(folded)
    assert again.keys() == folded.keys()
    assert all(again[key].equal(folded[key]) for key in folded)


def test_folded_weights_load_too(nano_state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(fold_state(nano_state), tmp_path / "nano.safetensors")
    found = load_sam("tiny_vit_nano", tmp_path / "nano.safetensors").state_dict()
    assert all(found[key].equal(value) for key, value in fold_state(nano_state).items())


def test_another_size_is_named(
    official_state: dict[str, Tensor], nano_state: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(nano_state, tmp_path / "nano.pth")
    assert "tiny_vit_nano: ask for that" in refusal("mobile_sam", tmp_path / "nano.pth")
    torch.save(official_state, tmp_path / "mobile_sam.pt")
    assert "mobile_sam: ask for that" in refusal("tiny_vit_nano", tmp_path / "mobile_sam.pt")


def test_another_family_is_named(official_state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(official_state, tmp_path / "mobile_sam.pt")
    assert "mobile_sam" in refusal("vit_b", tmp_path / "mobile_sam.pt").replace(
        str(tmp_path / "mobile_sam.pt"), ""
    )
    torch.save(build_sam("vit_nano").state_dict(), tmp_path / "nano.pth")
    assert "vit_nano" in refusal("mobile_sam", tmp_path / "nano.pth")


STEM = "image_encoder.patch_embed.seq.2"


def _without_a_mean(state: dict[str, Tensor]) -> None:
    del state[f"{STEM}.bn.running_mean"]


def _of_another_norm(state: dict[str, Tensor]) -> None:
    state[f"{STEM}.bn.weight"] = state[f"{STEM}.bn.weight"][:3]


def _without_a_bias_table(state: dict[str, Tensor]) -> None:
    del state["image_encoder.layers.1.blocks.0.attn.attention_biases"]


def _not_finite(state: dict[str, Tensor]) -> None:
    variance = state[f"{STEM}.bn.running_var"] = state[f"{STEM}.bn.running_var"].clone()
    variance[2] = float("nan")


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (_without_a_mean, f"{STEM}.bn"),
        (_of_another_norm, f"{STEM}.bn"),
        (_without_a_bias_table, "attention_biases"),
        (_not_finite, "not finite"),
    ],
)
def test_unfit_tensors_are_refused(
    nano_state: dict[str, Tensor],
    tmp_path: Path,
    damage: Callable[[dict[str, Tensor]], None],
    part: str,
) -> None:
    state = dict(nano_state)
    damage(state)
    torch.save(state, tmp_path / "nano.pth")
    assert part in refusal("tiny_vit_nano", tmp_path / "nano.pth")


@pytest.mark.parametrize("named", ["tinysam_w8a8.pth", "renamed.pth"])
def test_the_released_quantized_module_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    """It is a pickled module of classes in `tinysam`; what to use instead is said, in one line."""

    class Module(nn.Sequential):
        pass

    module: Any = types.ModuleType("tinysam.modeling.sam")
    module.Sam, Module.__module__, Module.__qualname__ = Module, module.__name__, "Sam"
    for name in ("tinysam", "tinysam.modeling"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.save(Module(nn.Linear(2, 2)), tmp_path / named)
    message = refusal("tinysam", tmp_path / named)
    assert "pickled module of TinySAM" in message
    assert "ptq4sam download tinysam" in message
    assert "exp/tinysam/" in message
    assert "\n" not in message


def test_a_pickled_module_is_refused(tmp_path: Path) -> None:
    pickled: Any = nn.Sequential(nn.Linear(2, 2))
    torch.save(pickled, tmp_path / "model.pth")
    message = refusal("tinysam", tmp_path / "model.pth")
    assert "Sequential" in message
    assert "state_dict" in message


def test_published_models_need_a_file() -> None:
    with pytest.raises(CheckpointError, match=r"mobile_sam\.pt.*ChaoningZhang/MobileSAM"):
        load_sam("mobile_sam")


def test_a_side_that_does_not_divide_is_refused() -> None:
    assert build_sam("tiny_vit_nano", 64).geometry.features == ((128, 8, 8),)
    with pytest.raises(ConfigError, match="multiple of its embedding's 8"):
        build_sam("tiny_vit_nano", 60)
