"""Each term of the loss against a computation of its own, number by number."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ptq4sam.distillation.losses import (
    asked_for,
    at_places,
    distance,
    hardness,
    mask_distance,
    measured_iou,
    near_box,
    truth_loss,
)
from ptq4sam.distillation.views import NEAR_POINTS, WIDE_POINTS

POINTS = NEAR_POINTS + WIDE_POINTS


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_embeddings_and_tokens_are_compared_by_their_mean_distance() -> None:
    ours, theirs = noise(2, 5, 3), noise(2, 5, 3, seed=1)
    expected = np.abs(ours.numpy() - theirs.numpy()).sum() / 30
    assert distance(ours, theirs).item() == pytest.approx(expected, rel=1e-6)


def test_masks_are_weighed_by_their_hardness() -> None:
    ours, theirs, hard = noise(2, 4, 3, 3), noise(2, 4, 3, 3, seed=1), noise(2, 4, seed=2).abs()
    expected = 0.0
    for n in range(2):
        for m in range(4):
            apart = [
                abs(float(a - b))
                for a, b in zip(ours[n, m].flatten(), theirs[n, m].flatten(), strict=True)
            ]
            expected += float(hard[n, m]) * sum(apart) / 9
    assert mask_distance(ours, theirs, hard).item() == pytest.approx(expected / 8, rel=1e-5)


@pytest.mark.parametrize(
    ("teacher", "student", "expected"),
    [(0.8, 0.8, 0.5), (0.0, 0.7, 0.2689), (0.9, 0.3, 1 / (1 + math.exp(-2))), (0.9, 0.0, 1.0)],
)
def test_hardness_grows_with_what_the_student_lacks(
    teacher: float, student: float, expected: float
) -> None:
    found = hardness(torch.tensor([teacher]), torch.tensor([student]))
    assert found.item() == pytest.approx(expected, abs=1e-4)


def test_truth_is_focal_and_dice() -> None:
    logits = 2 * noise(2, 4, POINTS)
    labels = (noise(2, POINTS, seed=1) > 0.5).float()
    found = truth_loss(logits, labels, 20.0, 3.0)
    for n in range(2):
        for m in range(4):
            focal = 0.0
            for x, y in zip(logits[n, m].tolist(), labels[n].tolist(), strict=True):
                p = 1 / (1 + math.exp(-x))
                right = p if y else 1 - p
                focal -= (1 - right) ** 2 * math.log(right)
            p, y = logits[n, m, :NEAR_POINTS].sigmoid(), labels[n, :NEAR_POINTS]
            dice = 1 - (2 * float(p @ y) + 1) / (float(p.sum() + y.sum()) + 1)
            assert found[n, m].item() == pytest.approx(20 * focal / POINTS + 3 * dice, rel=1e-4)


def test_what_is_object_as_often_as_not_stays_in_the_middle() -> None:
    """A class balance would move outlines inwards, and masks would shrink."""
    logits = torch.zeros(2, 1, POINTS, requires_grad=True)
    labels = torch.zeros(2, POINTS)
    labels[1] = 1
    truth_loss(logits, labels, 1.0, 0.0).sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.sum(0), torch.zeros(1, POINTS))
    assert bool((logits.grad[0] > 0).all())


def test_a_lone_click_is_judged_by_the_best_of_three() -> None:
    losses = torch.tensor([[1.0, 5, 3, 4], [1.0, 5, 3, 4]])
    assert asked_for(losses, torch.tensor([False, True])).item() == (1 + 3) / 2


def test_masks_are_read_at_places() -> None:
    logits = noise(1, 2, 8, 8)
    # Centres of cells (2, 3) and (5, 1), as (x, y).
    places = (2 * torch.tensor([[[2.5, 3.5], [5.5, 1.5]]]) / 8) - 1
    found = at_places(logits, places)
    torch.testing.assert_close(found[0, :, 0], logits[0, :, 3, 2])
    torch.testing.assert_close(found[0, :, 1], logits[0, :, 1, 5])


def test_what_is_far_from_the_object_counts_in_the_measured_iou() -> None:
    target = torch.zeros(1, 32, 32)
    target[:, 4:8, 4:8] = 1
    boxes = torch.tensor([[8.0, 8, 16, 16]])
    places = torch.rand(1, POINTS, 2, generator=torch.Generator().manual_seed(0))
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
