"""What a training writes around a SAM is taken off, with a note; what is no SAM is refused."""

from __future__ import annotations

import argparse
import datetime
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ptq4sam.errors import CheckpointError
from ptq4sam.families import build_sam
from ptq4sam.families.checkpoint import load_sam

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state(random_state: Callable[..., State]) -> State:
    return random_state(build_sam("vit_nano").state_dict())


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: tensor for key, tensor in state.items()}


def averaged(state: State) -> State:
    return {key: tensor + 1 for key, tensor in state.items()}


def part(state: State, name: str, prefix: str = "") -> State:
    """One part's tensors under names within the part."""
    start = f"{name}."
    return {prefix + k.removeprefix(start): t for k, t in state.items() if k.startswith(start)}


def loaded(content: object, path: Path) -> Mapping[str, Tensor]:
    torch.save(content, path)
    return load_sam("vit_nano", path).state_dict()


def refusal(content: object, path: Path) -> str:
    torch.save(content, path)
    with pytest.raises(CheckpointError) as caught:
        load_sam("vit_nano", path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def same(found: Mapping[str, Tensor], state: State) -> bool:
    return found.keys() == state.keys() and all(found[key].equal(state[key]) for key in state)


@pytest.mark.parametrize(
    ("around", "noted"),
    [
        (lambda s: prefixed(s, "module."), "the prefix 'module.' was taken off"),
        (lambda s: prefixed(s, "sam."), "'sam.'"),
        (lambda s: prefixed(s, "_orig_mod."), "'_orig_mod.'"),
        (lambda s: prefixed(s, "module._orig_mod.model.sam."), "'module._orig_mod.model.sam.'"),
        (
            lambda s: {"state_dict": prefixed(s, "model.sam.")},
            "'state_dict'; the prefix 'model.sam.'",
        ),
        (lambda s: {"model": prefixed(s, "module."), "epoch": 2}, "'module.'"),
        (lambda s: {"model": prefixed(s, "lora_sam.adapter.")}, "'lora_sam.adapter.'"),
        (lambda s: {"model_state": prefixed(s, "sam."), "init": {}}, "passed over init"),
        (lambda s: {"model_state_dict": s, "loss": 0.1}, "passed over loss"),
        (lambda s: {"state_dict_ema": s}, "under 'state_dict_ema'"),
        (lambda s: {"net": {"module": s}}, "under 'net.module'"),
        (lambda s: {**s, "epoch": 3}, "passed over epoch"),
        (lambda s: {**s, "step": torch.tensor(3.0), "rng": torch.get_rng_state()}, "step, rng"),
        (lambda s: {**prefixed(s, "module."), "n_averaged": torch.tensor(3)}, "n_averaged"),
        (lambda s: [s], "the weights are under '0'"),
        (lambda s: (7, {"model": s}), "under '1.model'; passed over 0"),
    ],
    ids=range(16),
)
def test_wrappers_are_taken_off(
    state: State,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    around: Callable[[State], Any],
    noted: str,
) -> None:
    with caplog.at_level(logging.INFO, "ptq4sam"):
        found = loaded(around(state), tmp_path / "nano.pth")
    assert same(found, state)
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert noted in caplog.text
    assert str(tmp_path / "nano.pth") in caplog.text


def test_an_unchanged_state_dict_needs_no_note(
    state: State, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "ptq4sam"):
        assert same(loaded(state, tmp_path / "nano.pth"), state)
    assert not caplog.records


def test_wrappers_within_names_and_parts_as_entries(state: State, tmp_path: Path) -> None:
    inner = {
        key.replace("image_encoder.", "image_encoder.module._orig_mod."): tensor
        for key, tensor in state.items()
    }
    assert same(loaded(inner, tmp_path / "a.pth"), state)
    nested = {
        key.replace("image_encoder.", "image_encoder.image_encoder."): t for key, t in state.items()
    }
    assert same(loaded(nested, tmp_path / "a.pth"), state)
    parts = {name: part(state, name, "module.") for name in ("image_encoder", "prompt_encoder")}
    parts["mask_decoder"] = part(state, "mask_decoder")
    assert same(loaded(parts, tmp_path / "a.pth"), state)


def test_what_a_training_saves_beside_a_sam_is_passed_over(
    state: State, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parameter = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    content = {
        "epoch": 3,
        "model": state,
        "optimizer": optimizer.state_dict(),
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1).state_dict(),
        "best_iou": np.float64(0.7),
        "history": {"iou": np.arange(3.0), "random": np.random.get_state()},
        "args": argparse.Namespace(output=Path("out"), lr=np.float32(1e-4)),
        "began": datetime.datetime.now(datetime.timezone.utc),
        "scores": defaultdict(list, {np.int64(3): [0.5]}),
    }
    for zipped in (True, False):
        path = tmp_path / "nano.pth"
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        with caplog.at_level(logging.INFO, "ptq4sam"):
            assert same(load_sam("vit_nano", path).state_dict(), state)
    assert "passed over epoch, optimizer, scheduler, best_iou, history and 3 more" in caplog.text


def test_of_weights_and_their_average_the_weights_are_taken(
    state: State, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    average = averaged(state)
    with caplog.at_level(logging.INFO, "ptq4sam"):
        beside = {"model_ema": average, "model": state}
        assert same(loaded(beside, tmp_path / "a.pth"), state)
        within = prefixed(average, "ema_model.") | prefixed(state, "model.")
        assert same(loaded(within, tmp_path / "a.pth"), state)
    assert "under 'ema_model.' was not taken" in caplog.text
    told = refusal({"student": state, "teacher": average}, tmp_path / "a.pth")
    assert "more than one SAM, under 'student.' and 'teacher.'" in told
    # The same tensors under two names, as of a module that is held twice.
    assert same(loaded(prefixed(state, "sam.") | state, tmp_path / "a.pth"), state)


def test_bytes_decide_the_format(state: State, tmp_path: Path) -> None:
    save_file(state, tmp_path / "a.pth")
    torch.save(state, tmp_path / "b.safetensors")
    for path in tmp_path.iterdir():
        assert same(load_sam("vit_nano", path).state_dict(), state)


class Settings:
    """A class of a user's own."""


@pytest.mark.parametrize(
    ("around", "told"),
    [
        (lambda s: {**s, "head.weight": torch.ones(2)}, "does not know head.weight"),
        (lambda s: {"model": s, "cfg": Settings()}, ".Settings), and reading that could run code"),
        (lambda s: torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (lambda s: part(s, "mask_decoder", "mask_decoder."), "holds the mask decoder of a SAM"),
        (lambda s: part(s, "image_encoder"), "image encoder of a SAM, but no mask decoder"),
        (lambda s: {"conv.weight": torch.ones(2)}, "holds no SAM, but conv.weight"),
        (
            lambda s: {key.replace("neck.0.weight", "neck.0.wieght"): t for key, t in s.items()},
            "misses image_encoder.neck.0.weight and does not know image_encoder.neck.0.wieght (the "
            "nearest is image_encoder.neck.0.weight)",
        ),
        (lambda s: {k: t for k, t in s.items() if "blocks.0.n" not in k}, "norm2.bias and 1 more"),
    ],
    ids=range(8),
)
def test_what_is_no_whole_sam_is_refused(
    state: State, tmp_path: Path, around: Callable[[State], Any], told: str
) -> None:
    assert told in refusal(around(state), tmp_path / "a.pth")


def test_how_to_save_again_is_told(state: State, tmp_path: Path) -> None:
    told = refusal({"model": state, "cfg": Settings()}, tmp_path / "a.pth")
    assert "torch.save(model.state_dict(), 'weights.pth')" in told
    torch.save(state, tmp_path / "a.pth", pickle_protocol=4)
    with pytest.raises(CheckpointError, match="another pickle protocol"):
        load_sam("vit_nano", tmp_path / "a.pth")


OTHERS = {
    "SAM-HQ": ("mask_decoder.hf_token.weight", "mask_decoder.compress_vit_feat.0.weight"),
    "LoRA": (
        "image_encoder.blocks.0.attn.qkv.linear_a_q.weight",
        "image_encoder.blocks.0.attn.qkv.lora_A.default.weight",
        "image_encoder.blocks.0.attn.qkv.w_a_linear_q.weight",
        "w_a_000",
        "w_Bs.3.weight",
    ),
    "adapters": (
        "image_encoder.blocks.0.Adapter.D_fc1.weight",
        "image_encoder.blocks.0.MLP_Adapter.D_fc1.weight",
        "image_encoder.blocks.0.mlp.adaptmlp.weight",
        "image_encoder.prompt_generator.shared_mlp0.weight",
    ),
    "quantized model of ptq4sam": ("image_encoder.blocks.0.attn.qkv.weight.codes",),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_changed_sams_are_named(state: State, tmp_path: Path, kind: str) -> None:
    for name in OTHERS[kind]:
        told = refusal({"model": {**state, name: torch.ones(2)}}, tmp_path / "a.pth")
        assert f"this is a {kind}" in told or f"this is a SAM with {kind}" in told
        assert name in told


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("image_encoder.trunk.pos_embed", "sam_mask_decoder.iou_token.weight"), "a SAM 2,"),
        (("vision_encoder.backbone.pos_embed", "no_memory_embedding"), "a SAM 2,"),
        (("image_encoder.patch_embed.seq.0.c.weight",), "ask for mobile_sam or tinysam"),
        (
            ("image_encoder.backbone.stages.0.op_list.0.conv.weight",),
            "ask for efficientvit_sam_l0 or",
        ),
        (
            ("image_encoder.patch_embed.seq.0.c.weight", "mask_decoder.hf_token.weight"),
            "a SAM-HQ,",
        ),
        (("vision_encoder.pos_embed", "mask_decoder.hq_token.weight"), "a SAM-HQ,"),
    ],
)
def test_other_families_are_named(tmp_path: Path, names: tuple[str, ...], told: str) -> None:
    content = {name: torch.ones(2) for name in names}
    assert told in refusal(prefixed(content, "model."), tmp_path / "a.pth")


def test_key_lists_of_other_families_are_named(tmp_path: Path) -> None:
    folder = Path(__file__).resolve().parents[3] / "shared" / "families" / "keys"
    if not folder.is_dir():
        pytest.skip("the key lists of other families are not at hand")
    kinds = {"sam2": "SAM 2", "sam_hq": "SAM-HQ", "eff": "efficientvit_sam_l0 or"}
    for file in folder.glob("*.txt"):
        state = {line.split()[0]: torch.ones(1) for line in file.read_text().splitlines()}
        kind = next((k for start, k in kinds.items() if file.name.startswith(start)), "mobile_sam")
        assert kind in refusal(state, tmp_path / "a.pth"), file.name
