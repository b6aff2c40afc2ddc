"""Prompts in rounds: boxes and clicks, then clicks where the mask is wrong."""

from __future__ import annotations

import torch

from ptq4sam.distillation.prompts import Prompts, clicks_in, jittered
from tests.model.conftest import tiny_sam


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
    first = Prompts.first(boxes, target, 2.0, 32, 0.0, generator)
    assert first.lone.all()
    again = first.refined(logits, target, 2.0, generator)
    assert again.points.shape == (2, 2, 2)
    assert again.labels[:, 1].tolist() == [1.0, 0.0]
    assert 8 <= float(again.points[0, 1, 0]) < 16
    assert float(again.points[1, 1, 1]) < 6
    assert not again.lone.any()
    assert not Prompts.first(boxes, target, 2.0, 32, 1.0, generator).lone.any()


def test_tokens_are_those_of_the_prompt_encoder() -> None:
    encoder = tiny_sam().prompt_encoder
    boxes, points = torch.tensor([[10.0, 20, 60, 50]] * 2), torch.rand(2, 2, 2) * 50
    labels = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    shift = torch.tensor([[8.0, 16.0], [0.0, 0.0]])
    asked = Prompts(boxes, torch.tensor([True, False]), points, labels).moved(shift)
    by_box, by_click = asked.embedded(encoder)
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
