"""The training of vit_nano: samples depend on the seed alone, a step learns, weights carry over."""

from __future__ import annotations

import numpy as np
import torch
from nano_data import NEAR_POINTS, WIDE_POINTS, Object, Picture, WindowDataset, collate
from nano_losses import near_box, separation_loss, total_loss
from nano_model import build_model, position_frequencies, resize_encoder
from PIL import Image
from torch.nn import functional as F
from train_vit_nano import Phase, Trainer, rate_at

from ptq4sam.sam.registry import build_sam

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
    pixels, boxes, masks, points, labels, owner, offsets = collate(
        [windows()[index] for index in range(4)]
    )
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
    ious = torch.ones(1, 4)
    loss, overlap = total_loss(right, ious, places, labels)
    assert overlap > 0.9
    assert loss < 0.2
    assert total_loss(-right, ious, places, labels)[0] > 5
    noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    separable = noise * 0.1 + target[:, None]
    assert separation_loss(separable, target, boxes, 2.0) < 0.1
    assert separation_loss(noise, target, boxes, 2.0) > 0.5


def test_near_box_grows_the_box() -> None:
    near = near_box(torch.tensor([[4.0, 4, 8, 8]]), 16)[0]
    # A margin of 0.2 * 4 + 2 cells: centres between 1.2 and 10.8.
    assert near.sum() == 10 * 10
    assert near[5, 5] == 1
    assert near[0, 0] == 0


def test_frequencies_are_harmonics_of_each_axis() -> None:
    matrix = position_frequencies(64)
    assert matrix.shape == (2, 64)
    assert ((matrix == 0).sum(dim=0) == 1).all()
