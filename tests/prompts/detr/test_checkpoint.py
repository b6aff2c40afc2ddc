from __future__ import annotations

import argparse
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ptq4sam.errors import CheckpointError
from ptq4sam.prompts.detr.checkpoint import load_into, read_tensors, rename
from ptq4sam.prompts.detr.detector import DETR_VARIANTS
from ptq4sam.skeletons import shapes_alone
from tests import detr_layouts

LAYOUTS = {"hdetr": detr_layouts.hdetr_r50, "focalnet-dino": detr_layouts.focalnet_dino_l}
STATE = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([1.0, 2.0])}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_full_size_model_has_the_published_names_and_shapes(kind: str) -> None:
    variant = DETR_VARIANTS[kind]
    # Tensors of full shape that hold one number.
    state = {name: torch.zeros(()).expand(shape) for name, shape in LAYOUTS[kind]().items()}
    found = rename(state, variant.rules, variant.unused, "published")
    with shapes_alone():
        model = variant.build()
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == expected


@pytest.mark.parametrize(("kind", "millions"), [("hdetr", 48), ("focalnet-dino", 228)])
def test_number_of_parameters(kind: str, millions: int) -> None:
    with shapes_alone():
        model = DETR_VARIANTS[kind].build()
    assert sum(weight.numel() for weight in model.parameters()) / 1e6 == pytest.approx(
        millions, abs=1
    )


def test_checkpoints_of_training_and_plain_ones(tmp_path: Path) -> None:
    arguments = argparse.Namespace(lr=2e-4, lr_drop_list=[30], device="cuda", resume=None)
    training = {
        "model": OrderedDict(STATE),
        "optimizer": {"state": {0: {"step": 1, "exp_avg": torch.zeros(3)}}, "param_groups": []},
        "lr_scheduler": {"milestones": Counter({30: 1}), "last_epoch": 35},
        "epoch": 35,
        "args": arguments,
    }
    # Kept as a set: their order changes with every use.
    before = set(torch.serialization.get_safe_globals())
    for name, legacy in (("zip.pth", False), ("legacy.pth", True)):
        torch.save(training, tmp_path / name, _use_new_zipfile_serialization=not legacy)
    torch.save(STATE, tmp_path / "plain.pth")
    save_file(STATE, tmp_path / "plain.safetensors")
    for path in tmp_path.iterdir():
        found = read_tensors(path)
        assert found.keys() == STATE.keys()
        assert all(torch.equal(found[name], STATE[name]) for name in STATE)
    assert set(torch.serialization.get_safe_globals()) == before


class Trap:
    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (Path("trapped"),)


@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_of_a_file_is_run(
    legacy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "trap.pth"
    content = {"model": STATE, "args": argparse.Namespace(trap=Trap())}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    _refused(path, "cannot be read as weights")
    torch.save(nn.Linear(2, 3), path, _use_new_zipfile_serialization=not legacy)
    _refused(path, "cannot be read as weights")
    assert not (tmp_path / "trapped").exists()


def test_files_without_weights(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"model": STATE}, path)
    content = path.read_bytes()
    for part in (b"", b"garbage", content[:300], content[: len(content) // 2]):
        path.write_bytes(part)
        _refused(path, "cannot be read as weights")
    (tmp_path / "x.safetensors").write_bytes(b"garbage")
    _refused(tmp_path / "x.safetensors", "cannot be read as weights")
    _refused(tmp_path / "none.pth", "cannot be read as weights")
    for other in ([1, 2], {"model": 3}, {"model": {"weight": 3}}, {"epoch": 3}, 5):
        torch.save(other, path)
        _refused(path, "holds no weights")


def _refused(path: Path, told: str) -> None:
    with pytest.raises(CheckpointError, match=told) as caught:
        read_tensors(path)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "copy"),
    [
        ("hdetr", "transformer.decoder.class_embed.6.bias"),
        ("focalnet-dino", "transformer.decoder.class_embed.5.bias"),
        ("focalnet-dino", "class_embed.3.bias"),
    ],
)
def test_copies_must_be_equal(kind: str, copy: str) -> None:
    variant = DETR_VARIANTS[kind]
    names = [n for n in LAYOUTS[kind]() if "class_embed" in n and n.endswith("bias")]
    state = {name: torch.ones(91) for name in names}
    rename(state, variant.rules, variant.unused, "x.pth")
    state[copy] = torch.zeros(91)
    with pytest.raises(CheckpointError, match=r"x\.pth: .* differs from its copy"):
        rename(state, variant.rules, variant.unused, "x.pth")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"bias": None}, "bias missing"),
        ({"bias": None, "weight": None}, "bias and 1 more missing"),
        ({"other": torch.zeros(1)}, "other not known"),
        ({"bias": None, "other": torch.zeros(1)}, "bias missing and other not known"),
        ({"bias": torch.zeros(3)}, r"bias of shape \[2\] .* \[3\] in torch.float32"),
        ({"bias": torch.zeros(2, dtype=torch.int8)}, r"bias of shape .* \[2\] in torch.int8"),
    ],
)
def test_weights_must_fit_in_both_directions(change: dict[str, Tensor | None], told: str) -> None:
    state = {k: v for k, v in (STATE | change).items() if v is not None}
    with shapes_alone():
        model = nn.Linear(3, 2)
    with pytest.raises(CheckpointError, match=told) as caught:
        load_into(model, state, "x.pth")
    assert "\n" not in str(caught.value)


def test_weights_become_float32_of_their_own() -> None:
    with shapes_alone():
        model = nn.Linear(3, 2)
    state = {name: tensor.half() for name, tensor in STATE.items()}
    load_into(model, state, "x.pth")
    assert torch.equal(model(torch.eye(3)), STATE["weight"].T + STATE["bias"])
    whole = {name: tensor.clone() for name, tensor in STATE.items()}
    load_into(model, whole, "x.pth")
    whole["bias"].zero_()
    assert torch.equal(model.bias, STATE["bias"])
