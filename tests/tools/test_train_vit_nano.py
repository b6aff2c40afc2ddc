"""The training of vit_nano: samples depend on the seed alone, a step learns, weights carry over."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from nano_data import NEAR_POINTS, WIDE_POINTS, Object, Picture, WindowDataset, collate
from nano_losses import feature_loss, measured_iou, near_box, separation_loss, total_loss
from nano_model import build_model, position_frequencies, resize_encoder
from nano_prompts import Prompts, clicks_in, jittered
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from train_vit_nano import Phase, Settings, Trainer, export, rate_at

from ptq4sam.families import build_sam
from ptq4sam.families.tiny_vit.sizes import NANO
from ptq4sam.families.tiny_vit.variants import build_variant as build_tiny_vit
from ptq4sam.sam.model import Sam

PHASE = Phase(128, 2, 4, 1e-3, 1e-4)


def windows(length: int = 4) -> WindowDataset:
    return WindowDataset(None, 1.0, 128, 256, boxes=3, seed=5, length=length)


def test_a_sample_depends_on_seed_and_index_alone() -> None:
    first, again = windows()[3], windows()[3]
    other = windows()[2]
    assert torch.equal(first.pixels, again.pixels)
    assert torch.equal(first.boxes, again.boxes)
    assert torch.equal(first.masks, again.masks)
    assert not torch.equal(first.pixels, other.pixels)


def test_samples_are_windows_of_the_input() -> None:
    batch = collate([windows()[index] for index in range(4)])
    pixels, boxes, masks, points = batch.pixels, batch.boxes, batch.masks, batch.points
    labels, owner, offsets = batch.labels, batch.owner, batch.offsets
    assert pixels.shape == (4, 3, 128, 128)
    assert masks.shape == (len(boxes), 128, 128)
    assert owner.tolist() == sorted(owner.tolist())
    assert (offsets % 8 == 0).all()
    assert (offsets >= 0).all()
    assert (offsets <= 128).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert boxes.min() >= 0
    assert boxes.max() <= 128
    x, y = points.long().clamp(max=127).unbind(-1)
    in_masks = torch.stack([mask[v, u] for mask, u, v in zip(masks, x, y, strict=True)])
    # The masks are coarser, so that they differ from the labels along outlines alone.
    assert ((in_masks >= 128) == (labels > 0)).float().mean() > 0.97
    assert 0.1 < labels[:, :NEAR_POINTS].mean() < 0.9
    assert labels[:, NEAR_POINTS:].mean() < labels[:, :NEAR_POINTS].mean()


def test_a_small_object_keeps_its_outline() -> None:
    mask = np.zeros((400, 600), np.uint8)
    mask[101:104, 200:213] = 255
    picture = Picture(
        Image.new("RGB", (600, 400)), [Object((200.0, 101.0, 213.0, 104.0), lambda: mask)]
    )
    for index in range(20):
        sample = windows().window_of(picture, np.random.default_rng(index))
        if sample is None:
            continue
        inside = sample.points[0][sample.labels[0] > 0]
        sides = inside.amax(0) - inside.amin(0)
        assert 0.5 < float(sides[0] / sides[1]) / (13 / 3) < 2
        return
    raise AssertionError("no window shows the object")


def test_two_trainers_make_the_same_steps_and_a_resumed_one_too() -> None:
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


@pytest.fixture(scope="module")
def teacher() -> Sam:
    torch.manual_seed(1)
    return build_model(128).eval().requires_grad_(False)


def distilling(teacher: Sam, masks: bool, seed: int = 0) -> Trainer:
    phase = dataclasses.replace(PHASE, distil=1.0, masks=masks)
    return Trainer(phase, 0, seed, name="tiny_vit_nano", teacher=teacher)


@pytest.mark.parametrize("masks", [True, False])
def test_a_pupil_resumes_too(teacher: Sam, masks: bool) -> None:
    batches = [collate([windows()[2 * step], windows()[2 * step + 1]]) for step in range(2)]
    straight = distilling(teacher, masks)
    losses = [straight.train_step(batch) for batch in batches]
    stopped = distilling(teacher, masks)
    assert stopped.train_step(batches[0]) == losses[0]
    resumed = distilling(teacher, masks, seed=1)
    resumed.restore(stopped.state())
    assert resumed.train_step(batches[1]) == losses[1]
    for name, value in straight.average.items():
        assert torch.equal(resumed.average[name], value), name


def test_a_pupil_begins_with_its_teachers_decoder_and_nears_its_embeddings(teacher: Sam) -> None:
    trainer = distilling(teacher, masks=False)
    for ours, theirs in zip(
        trainer.model.mask_decoder.parameters(), teacher.mask_decoder.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)
    batch = collate([windows()[0], windows()[1]])
    trainer.phase = dataclasses.replace(trainer.phase, steps=1000)
    losses = [trainer.train_step(batch) for _ in range(25)]
    assert losses[-1] < 0.9 * losses[0]


def test_an_export_is_folded_and_gives_what_was_trained(teacher: Sam, tmp_path: Path) -> None:
    trainer = distilling(teacher, masks=False)
    trainer.train_step(collate([windows()[0], windows()[1]]))
    trainer.load_weights({name: value.half().float() for name, value in trainer.average.items()})
    export(trainer.average, tmp_path / "weights.safetensors")
    folded = build_tiny_vit("tiny_vit_nano", NANO)
    folded.load_state_dict(
        {name: value.float() for name, value in load_file(tmp_path / "weights.safetensors").items()}
    )
    pixels = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = trainer.model.eval().image_encoder(pixels)
        # Folded weights are float16 too.
        error = (folded.image_encoder(pixels) - expected).abs().max()
    assert error < 0.01 * expected.abs().max()


def test_a_window_encoder_carries_over_to_the_whole_input() -> None:
    torch.manual_seed(0)
    small = build_model(128).state_dict()
    whole = build_sam("vit_nano")
    whole.load_state_dict(resize_encoder(small, whole.state_dict()))
    table = whole.image_encoder.blocks[3].attn.rel_pos_h
    assert torch.equal(table[16:-16], small["image_encoder.blocks.3.attn.rel_pos_h"])
    back = resize_encoder(whole.state_dict(), small)
    assert all(torch.equal(back[name], value) for name, value in small.items())


def test_learning_rate_warms_up_and_ends_at_the_final_one() -> None:
    phase = Phase(128, 2, 1000, 1e-3, 1e-4)
    rates = [rate_at(phase, step) for step in range(1001)]
    assert rates[0] < rates[100] < max(rates)
    assert max(rates) <= 1e-3
    assert abs(rates[1000] - 1e-4) < 1e-9


def test_losses_prefer_the_right_mask_and_separable_features() -> None:
    target = torch.zeros(1, 16, 16)
    target[:, 4:10, 5:12] = 1
    boxes = torch.tensor([[10.0, 8, 24, 20]])
    places = torch.rand(1, NEAR_POINTS + WIDE_POINTS, 2) * 2 - 1
    labels = F.grid_sample(target[:, None], places[:, None], "nearest", align_corners=False)[
        :, 0, 0
    ]
    right = (20 * target[:, None] - 10).expand(-1, 4, -1, -1)
    seen = torch.ones(1, 16, 16)
    clear, lone = torch.tensor([False]), torch.tensor([True])
    truth = measured_iou(right, places, labels, boxes, seen, 2.0)
    assert truth.min() > 0.9
    assert total_loss(right, truth, places, labels, truth, clear) < 0.2
    assert total_loss(-right, truth, places, labels, truth, clear) > 5
    # A lone click is judged by the best of three masks, a clear prompt by the first one.
    first_wrong = right.clone()
    first_wrong[:, 0] *= -1
    as_clear = total_loss(first_wrong, truth, places, labels, truth, clear)
    assert total_loss(first_wrong, truth, places, labels, truth, lone) < 0.5 * as_clear
    assert total_loss(right, truth - 0.5, places, labels, truth, clear) > 0.4
    noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    separable = noise * 0.1 + target[:, None]
    assert separation_loss(separable, target, boxes, 2.0) < 0.1
    assert separation_loss(noise, target, boxes, 2.0) > 0.5


def test_what_is_far_from_the_object_counts_in_the_measured_iou() -> None:
    target = torch.zeros(1, 32, 32)
    target[:, 4:8, 4:8] = 1
    boxes = torch.tensor([[8.0, 8, 16, 16]])
    places = torch.rand(1, NEAR_POINTS + WIDE_POINTS, 2, generator=torch.Generator().manual_seed(0))
    places = (places * 15.2 + 4.4) / 32 - 1  # near the box
    labels = F.grid_sample(target[:, None], places[:, None], "nearest", align_corners=False)[
        :, 0, 0
    ]
    far = target.clone()
    far[:, 20:28, 20:28] = 1
    logits = torch.stack([target, far], dim=1) * 20 - 10
    exact, both = measured_iou(logits, places, labels, boxes, torch.ones(1, 32, 32), 2.0)[0]
    assert exact > 0.85
    assert abs(float(both) - 16 / 80) < 0.05
    hidden = torch.ones(1, 32, 32)
    hidden[:, 16:] = 0
    assert measured_iou(logits, places, labels, boxes, hidden, 2.0)[0, 1] > 0.85


def test_near_box_grows_the_box() -> None:
    near = near_box(torch.tensor([[4.0, 4, 8, 8]]), 16, 1.0)[0]
    # A margin of 0.2 * 4 + 2 cells: centres between 1.2 and 10.8.
    assert near.sum() == 10 * 10
    assert near[5, 5] == 1
    assert near[0, 0] == 0
    coarse = near_box(torch.tensor([[8.0, 8, 16, 16]]), 16, 2.0)[0]
    # A margin of 3.6 pixels: centres between 4.4 and 19.6, which are cells 2 to 9.
    assert coarse.sum() == 8 * 8


def test_clicks_lie_in_their_region_half_of_them_deep_inside() -> None:
    region = torch.zeros(400, 32, 32)
    region[:, 4:25, 4:25] = 1
    points, index = clicks_in(region, 2.0, torch.Generator().manual_seed(0))
    assert (region.flatten(1).gather(1, index) == 1).all()
    assert ((points // 2)[:, 0] == index[:, 0] % 32).all()
    assert ((points // 2)[:, 1] == index[:, 0] // 32).all()
    middle = (points / 2 - 14.5).abs().amax(dim=1) < 5
    # Anywhere, a click would be in the middle by 0.23.
    assert 0.33 < middle.float().mean() < 0.8


def test_a_refined_prompt_clicks_where_the_mask_is_wrong() -> None:
    target = torch.zeros(2, 16, 16)
    target[:, 4:12, 4:12] = 1
    logits = target * 20 - 10
    logits[0, 4:12, 4:8] = -10  # half of it is missed
    logits[1, 0:3] = 10  # a stripe too much
    generator = torch.Generator().manual_seed(0)
    boxes = torch.tensor([[8.0, 8, 24, 24]] * 2)
    first = Prompts.first(boxes, target, 2.0, 32, generator)
    again = first.refined(logits, target, 2.0, generator)
    assert again.points.shape == (2, 2, 2)
    assert again.labels[:, 1].tolist() == [1.0, 0.0]
    assert 8 <= float(again.points[0, 1, 0]) < 16
    assert float(again.points[1, 1, 1]) < 6


def test_tokens_are_those_of_the_prompt_encoder() -> None:
    encoder = build_sam("vit_nano").prompt_encoder
    boxes, points = torch.tensor([[10.0, 20, 60, 90]] * 2), torch.rand(2, 2, 2) * 50
    labels = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    asked = Prompts(boxes, torch.tensor([True, False]), points, labels)
    shift = torch.tensor([[8.0, 16.0], [0.0, 0.0]])
    by_box, by_click = asked.embedded(encoder, shift)
    moved = boxes[:1] + torch.tensor([[8.0, 16, 8, 16]])
    expected = encoder((points[:1, 1:] + shift[0], labels[:1, 1:]), moved)[0][0]
    torch.testing.assert_close(by_box, expected)
    torch.testing.assert_close(by_click, encoder((points[1:], labels[1:]))[0][0])


def test_half_of_the_boxes_stay_exact() -> None:
    boxes = torch.tensor([[20.0, 20, 60, 100]]).repeat(400, 1)
    moved = jittered(boxes, 128, torch.Generator().manual_seed(0))
    same = (moved == boxes).all(dim=1).float().mean()
    assert 0.4 < same < 0.6
    assert (moved - boxes).abs().max() <= 10.5


def test_foretold_features_are_compared_by_their_spread() -> None:
    target = torch.randn(2, 3, 8, 8) * torch.tensor([1.0, 10, 100])[:, None, None] + 5
    mean, spread = target.mean((0, 2, 3), keepdim=True), target.std((0, 2, 3), keepdim=True)
    assert feature_loss((target - mean) / spread, target) < 0.01
    assert 0.9 < feature_loss(torch.zeros_like(target), target) < 1.1


def test_settings_come_from_a_file_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    settings = Settings.read(Path(__file__).resolve().parents[2] / "tools" / "vit_nano.yaml")
    assert [phase.window for phase in settings.phases] == [128, 256]
    assert settings.sources[2].weights["BSDS500+SOD"] == 1
    pupil = Settings.read(Path(__file__).resolve().parents[2] / "tools" / "tiny_vit_nano.yaml")
    assert (pupil.model, pupil.teacher) == ("tiny_vit_nano", "vit_nano")
    assert [phase.masks for phase in pupil.phases] == [False, True]
    other = tmp_path / "other.yaml"
    other.write_text("phases: []\nbatches: 3\n")
    with pytest.raises(TypeError, match="batches"):
        Settings.read(other)


def test_frequencies_are_harmonics_of_each_axis() -> None:
    matrix = position_frequencies(64)
    assert matrix.shape == (2, 64)
    assert ((matrix == 0).sum(dim=0) == 1).all()
