"""Checkpoints as mmengine writes them are read; what else a file may name is not."""

from __future__ import annotations

import copyreg
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ptq4sam.errors import CheckpointError
from ptq4sam.prompts.mmdet_checkpoint import current_names, load_weights, read_state

WEIGHTS = {"conv.weight": torch.arange(6.0).reshape(2, 3), "conv.bias": torch.ones(2)}


class _Command:
    """What an attacker's file holds: a call that unpickling makes."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


def _save(content: object, path: Path, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def _same(state: dict[str, torch.Tensor]) -> bool:
    return state.keys() == WEIGHTS.keys() and all(state[k].equal(WEIGHTS[k]) for k in WEIGHTS)


@pytest.mark.parametrize("zipped", [True, False])
def test_weights_of_mmdetection_2(tmp_path: Path, zipped: bool) -> None:
    content = {"meta": {"CLASSES": ("a", "b"), "epoch": 3}, "state_dict": WEIGHTS}
    path = _save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    assert _same(read_state(path))
    assert _same(read_state(_save(WEIGHTS, path)))


def test_copies_of_a_moving_average_are_left_out(tmp_path: Path) -> None:
    state = WEIGHTS | {"ema_conv_weight": torch.zeros(2, 3), "ema_conv_bias": torch.zeros(2)}
    assert _same(read_state(_save({"state_dict": state}, tmp_path / "a.pth")))


@pytest.mark.parametrize("zipped", [True, False])
def test_the_history_of_mmengine_is_passed_over(tmp_path: Path, zipped: bool) -> None:
    history = pytest.importorskip("mmengine.logging").HistoryBuffer([0.5, 0.25], [1, 1])
    content = {
        "state_dict": WEIGHTS,
        "message_hub": {
            "log_scalars": {"train/loss": history},
            "runtime_info": {"lr": np.float64(0.1), "iter": 2},
            "resumed_keys": {"train/loss": True},
        },
    }
    path = _save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(path, weights_only=True)
    assert _same(read_state(path))
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(path, weights_only=True)  # what was allowed for this file is not from then on
    if zipped:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        assert "mmengine.logging.history_buffer.HistoryBuffer" in named


def test_a_checkpoint_of_a_training(tmp_path: Path) -> None:
    """mmengine trains two steps and writes optimizer, schedule and history beside the weights."""
    pytest.importorskip("mmengine")
    from mmengine.model import BaseModel
    from mmengine.runner import Runner
    from torch.utils.data import DataLoader

    class Line(BaseModel):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor, mode: str) -> dict[str, torch.Tensor]:
            return {"loss": self.conv(x).square().mean()}

    runner = Runner(
        model=Line(),
        work_dir=str(tmp_path),
        train_dataloader=DataLoader([{"x": torch.ones(3)}, {"x": torch.zeros(3)}]),
        train_cfg={"by_epoch": True, "max_epochs": 1},
        optim_wrapper={"optimizer": {"type": "Adam", "lr": 0.1}},
        param_scheduler={"type": "MultiStepLR", "milestones": [1]},
        experiment_name=tmp_path.name,
        log_level="ERROR",
    )
    runner.train()
    trained = runner.model.state_dict()
    state = read_state(tmp_path / "epoch_1.pth")
    assert state.keys() == trained.keys()
    assert all(state[key].equal(trained[key].cpu()) for key in trained)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        ((os.system, "touch ran"), "system"),
        ((eval, "open('ran', 'w')"), "eval"),
        ((np.load, "x"), "numpy.load"),
        ((copyreg._reconstructor, nn.Linear, object, None), "copyreg._reconstructor"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_run_something_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: tuple[Any, ...],
    named: str,
    zipped: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": WEIGHTS, "message_hub": _Command(*call)}
    path = _save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=rf"a\.pth is refused: .*{named}") as caught:
        read_state(path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_what_the_history_may_name_has_no_effect(tmp_path: Path) -> None:
    """`getattr` is among the names; it must lead to nothing."""
    method = _Command(getattr, os.environ.__class__, "clear")
    content = {"state_dict": WEIGHTS | {"x": _Command(getattr, "".join, "__class__")}, "m": method}
    before = dict(os.environ)
    with pytest.raises(CheckpointError, match="is refused"):
        read_state(_save(content, tmp_path / "a.pth"))  # os._Environ is not among them
    content["m"] = _Command(getattr, np.ndarray, "tofile")
    content["state_dict"] = WEIGHTS | {"x": _Command(getattr, np.ndarray, "fill")}
    assert _same(read_state(_save(content, tmp_path / "a.pth")))
    assert dict(os.environ) == before


def test_files_that_are_no_checkpoint_are_one_line_that_names_them(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    with pytest.raises(CheckpointError, match=r"a\.pth cannot be read"):
        read_state(path)
    whole = _save({"state_dict": WEIGHTS}, path).read_bytes()
    for content in (b"", b"<html>no such page</html>", whole[: len(whole) // 2], whole[:-30]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"a\.pth ") as caught:
            read_state(path)
        assert "\n" not in str(caught.value)
    legacy = _save({"state_dict": WEIGHTS}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(legacy.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"a\.pth "):
        read_state(path)
    for nothing in ([1, 2], {"state_dict": 3}, {"state_dict": {}}, {"meta": {"epoch": 1}}):
        with pytest.raises(CheckpointError, match=r"a\.pth has no (state_dict|weights)"):
            read_state(_save(nothing, path))


def test_weights_fit_in_both_directions(tmp_path: Path) -> None:
    model = nn.ModuleDict({"conv": nn.Linear(3, 2)})
    path = tmp_path / "a.pth"
    load_weights(model, _save(WEIGHTS, path), "line")
    assert model["conv"].weight.equal(WEIGHTS["conv.weight"])
    with pytest.raises(
        CheckpointError, match=r"missing 1 parameters \(conv.bias\), not known 1 .*x"
    ):
        load_weights(
            model, _save({"conv.weight": WEIGHTS["conv.weight"], "x": torch.ones(1)}, path), "line"
        )
    with pytest.raises(CheckpointError, match=r"does not fit line: size mismatch for conv\.bias"):
        load_weights(model, _save(WEIGHTS | {"conv.bias": torch.ones(3)}, path), "line")


def test_names_of_dino_in_mmdetection_2() -> None:
    old_and_new = {
        "backbone.conv1.weight": "backbone.conv1.weight",
        "neck.extra_convs.0.gn.bias": "neck.extra_convs.0.gn.bias",
        "bbox_head.cls_branches.6.bias": "bbox_head.cls_branches.6.bias",
        "bbox_head.reg_branches.0.4.weight": "bbox_head.reg_branches.0.4.weight",
        "bbox_head.label_embedding.weight": "dn_query_generator.label_embedding.weight",
        "bbox_head.transformer.level_embeds": "level_embed",
        "bbox_head.transformer.query_embed.weight": "query_embedding.weight",
        "bbox_head.transformer.enc_output.bias": "memory_trans_fc.bias",
        "bbox_head.transformer.enc_output_norm.bias": "memory_trans_norm.bias",
        "bbox_head.transformer.encoder.layers.5.attentions.0.value_proj.bias": (
            "encoder.layers.5.self_attn.value_proj.bias"
        ),
        "bbox_head.transformer.encoder.layers.0.ffns.0.layers.0.0.weight": (
            "encoder.layers.0.ffn.layers.0.0.weight"
        ),
        "bbox_head.transformer.encoder.layers.0.norms.1.weight": "encoder.layers.0.norms.1.weight",
        "bbox_head.transformer.decoder.layers.3.attentions.0.attn.in_proj_bias": (
            "decoder.layers.3.self_attn.attn.in_proj_bias"
        ),
        "bbox_head.transformer.decoder.layers.3.attentions.1.sampling_offsets.bias": (
            "decoder.layers.3.cross_attn.sampling_offsets.bias"
        ),
        "bbox_head.transformer.decoder.layers.3.ffns.0.layers.1.bias": (
            "decoder.layers.3.ffn.layers.1.bias"
        ),
        "bbox_head.transformer.decoder.ref_point_head.2.bias": (
            "decoder.ref_point_head.layers.1.bias"
        ),
        "bbox_head.transformer.decoder.norm.bias": "decoder.norm.bias",
    }
    state = {key: torch.tensor(float(i)) for i, key in enumerate(old_and_new)}
    converted = current_names(state)
    assert converted == {old_and_new[key]: value for key, value in state.items()}
    assert current_names(converted) == converted
