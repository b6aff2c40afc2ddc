"""The training of vit_nano: windows, a step that comes out again, weights of another size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from nano_data import WindowDataset, collate
from nano_losses import feature_loss, separation_loss, total_loss
from nano_model import build_model, position_frequencies, resize_encoder
from safetensors.torch import load_file
from torch.nn import functional as F
from train_vit_nano import Settings, Trainer, WindowPhase, export

from ptq4sam.distillation.losses import measured_iou
from ptq4sam.distillation.settings import DistillationSettings
from ptq4sam.distillation.students import require_pair
from ptq4sam.distillation.views import NEAR_POINTS, WIDE_POINTS
from ptq4sam.errors import ConfigError
from ptq4sam.families import build_sam
from ptq4sam.yaml_files import read_yaml

PHASE = WindowPhase(4, 2, 1e-3, 1e-4, window=128)
TOOLS = Path(__file__).resolve().parents[2] / "tools"


def windows(length: int = 4) -> WindowDataset:
    return WindowDataset(None, 1.0, 128, 256, boxes=3, seed=5, length=length)


def test_samples_are_windows_of_the_input() -> None:
    batch = collate([windows()[index] for index in range(2)])
    assert batch.pixels.shape == (2, 3, 128, 128)
    assert batch.views.target.shape == (len(batch.views.boxes), 64, 64)
    assert (batch.offsets % 8 == 0).all()
    assert (batch.offsets >= 0).all()
    assert (batch.offsets <= 128).all()
    assert batch.views.boxes.max() <= 128
    for pixels, picture in zip(batch.pixels, batch.views.pictures, strict=True):
        height, width = picture.shape[1:]
        assert torch.equal(pixels[:, :height, :width], picture.short())
        assert (pixels[:, height:] == -1).all()
        assert (pixels[:, :, width:] == -1).all()


def test_two_trainers_make_the_same_steps_and_a_resumed_one_too(tmp_path: Path) -> None:
    batches = [collate([windows()[2 * step], windows()[2 * step + 1]]) for step in range(2)]
    straight = Trainer(PHASE, 0, seed=0)
    losses = [straight.train_step(batch) for batch in batches]
    stopped = Trainer(PHASE, 0, seed=0)
    assert stopped.train_step(batches[0]) == losses[0]
    resumed = Trainer(PHASE, 0, seed=1)
    resumed.restore(stopped.state())
    assert resumed.train_step(batches[1]) == losses[1]
    ours, theirs = resumed.model.state_dict(), straight.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    export(resumed.average, tmp_path / "weights.safetensors")
    written = load_file(tmp_path / "weights.safetensors")
    assert written.keys() == ours.keys()
    assert all(torch.equal(written[name], resumed.average[name].half()) for name in written)


def test_a_window_encoder_carries_over_to_the_whole_input() -> None:
    torch.manual_seed(0)
    small = build_model(128).state_dict()
    whole = build_sam("vit_nano")
    whole.load_state_dict(resize_encoder(small, whole.state_dict()))
    table = whole.image_encoder.blocks[3].attn.rel_pos_h
    assert torch.equal(table[16:-16], small["image_encoder.blocks.3.attn.rel_pos_h"])
    back = resize_encoder(whole.state_dict(), small)
    assert all(torch.equal(back[name], value) for name, value in small.items())


def test_losses_prefer_the_right_mask_and_separable_features() -> None:
    target = torch.zeros(1, 16, 16)
    target[:, 4:10, 5:12] = 1
    boxes = torch.tensor([[10.0, 8, 24, 20]])
    generator = torch.Generator().manual_seed(0)
    places = torch.rand(1, NEAR_POINTS + WIDE_POINTS, 2, generator=generator) * 2 - 1
    labels = F.grid_sample(target[:, None], places[:, None], "nearest", align_corners=False)[
        :, 0, 0
    ]
    right = (20 * target[:, None] - 10).expand(-1, 4, -1, -1)
    clear, lone = torch.tensor([False]), torch.tensor([True])
    truth = measured_iou(right, places, labels, boxes, torch.ones(1, 16, 16), 2.0)
    assert total_loss(right, truth, places, labels, truth, clear) < 0.2
    assert total_loss(-right, truth, places, labels, truth, clear) > 5
    # A lone click is judged by the best of three masks, a clear prompt by the first one.
    first_wrong = right.clone()
    first_wrong[:, 0] *= -1
    as_clear = total_loss(first_wrong, truth, places, labels, truth, clear)
    assert total_loss(first_wrong, truth, places, labels, truth, lone) < 0.5 * as_clear
    assert total_loss(right, truth - 0.5, places, labels, truth, clear) > 0.4
    noise = torch.randn(1, 3, 16, 16, generator=generator)
    separable = noise * 0.1 + target[:, None]
    assert separation_loss(separable, target, boxes, 2.0) < 0.1
    assert separation_loss(noise, target, boxes, 2.0) > 0.5


def test_foretold_features_are_compared_by_their_spread() -> None:
    target = torch.randn(2, 3, 8, 8) * torch.tensor([1.0, 10, 100])[:, None, None] + 5
    mean, spread = target.mean((0, 2, 3), keepdim=True), target.std((0, 2, 3), keepdim=True)
    assert feature_loss((target - mean) / spread, target) < 0.01
    assert 0.9 < feature_loss(torch.zeros_like(target), target) < 1.1


def test_settings_come_from_a_file_and_unknown_ones_are_refused() -> None:
    settings = Settings.from_dict(read_yaml(TOOLS / "vit_nano.yaml", "settings"))
    assert [phase.window for phase in settings.phases] == [128, 256]
    assert settings.sources[2].weights["BSDS500+SOD"] == 1
    with pytest.raises(ConfigError, match="phases"):
        Settings.from_dict({"phase": []})


@pytest.mark.parametrize("name", ["tiny_vit_nano", "efficientvit_sam_nano"])
def test_other_small_sams_are_trained_by_settings_alone(name: str) -> None:
    pupil = DistillationSettings.read(TOOLS / f"{name}.yaml")
    assert (pupil.student, pupil.teacher) == (name, "vit_nano")
    assert [phase.terms.of_masks for phase in pupil.phases] == [False, True]
    pupil.require_something_to_learn(has_teacher=True)
    require_pair(build_sam(pupil.student), build_sam("vit_nano"))


def test_frequencies_are_harmonics_of_each_axis() -> None:
    matrix = position_frequencies(64)
    assert matrix.shape == (2, 64)
    assert ((matrix == 0).sum(dim=0) == 1).all()
