"""Filters on masks drawn by hand, and against slow code that says the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ptq4sam.everything.crops import Crop
from ptq4sam.everything.filters import (
    cut_off,
    mask_boxes,
    stability,
    without_duplicates,
    without_small_regions,
)


def drawn(*rows: str) -> NDArray[np.bool_]:
    return np.array([[pixel == "#" for pixel in row] for row in rows])


def test_stability_is_the_iou_of_two_cuts() -> None:
    logits = torch.tensor([[[-3.0, -0.5, 0.5, 2.0, 4.0]], [[-9.0] * 5], [[9.0] * 5]])
    assert stability(logits, 1.0).tolist() == [0.5, 0.0, 1.0]
    assert stability(logits, 0.0)[0] == 1


def test_boxes_hold_the_outermost_pixels() -> None:
    masks = torch.from_numpy(np.random.default_rng(0).random((50, 7, 9)) < 0.04)
    assert not masks.flatten(1).any(dim=1).all()
    for mask, box in zip(masks, mask_boxes(masks).tolist(), strict=True):
        rows, columns = np.nonzero(mask.numpy())
        expected = [columns.min(), rows.min(), columns.max(), rows.max()] if len(rows) else [0] * 4
        assert box == expected


def test_boxes_at_a_crop_edge_within_the_picture_were_cut_off() -> None:
    crop, size = Crop((100, 0, 200, 100), 1), (300, 400)
    boxes = torch.tensor(
        [
            [121, 30, 179, 79],  # 21 pixels from each edge
            [120, 30, 179, 79],
            [121, 30, 180, 79],
            [121, 30, 179, 80],
            [121, 0, 179, 79],  # at the picture's own edge
        ]
    )
    assert cut_off(boxes, crop, size).tolist() == [False, True, True, True, False]
    whole = Crop((0, 0, 400, 300), 0)
    assert not cut_off(torch.tensor([[0, 0, 400, 300], [5, 5, 9, 9]]), whole, size).any()


def test_of_two_alike_the_better_one_stays() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30], [0, 0, 10, 4]])
    kept = without_duplicates(boxes, np.array([0.5, 0.9, 0.7, 0.1]), 0.7)
    assert kept.tolist() == [1, 2, 3]
    assert without_duplicates(np.zeros((0, 4), np.int64), np.zeros(0), 0.7).tolist() == []


def test_small_holes_are_filled_and_small_islands_removed() -> None:
    before = drawn(
        "####....",
        "#.##..#.",
        "####....",
        "####....",
    )
    assert np.array_equal(
        without_small_regions(before, 2),
        drawn("####....", "####....", "####....", "####...."),
    )


def test_regions_touch_over_corners() -> None:
    diagonal = drawn("#...", ".#..", "..#.", "....")
    assert np.array_equal(without_small_regions(diagonal, 3), diagonal)


def test_the_largest_island_stays_however_small() -> None:
    before = drawn("#....", ".....", "...##", ".....")
    assert np.array_equal(
        without_small_regions(before, 5), drawn(".....", ".....", "...##", ".....")
    )
    nothing = np.zeros((9, 9), bool)
    assert not without_small_regions(nothing, 5).any()


@pytest.mark.parametrize("pixels", [1, 4, 20])
def test_regions_are_those_of_the_official_code(pixels: int) -> None:
    pytest.importorskip("cv2")
    amg = pytest.importorskip("segment_anything.utils.amg")
    random = np.random.default_rng(pixels)
    for share in (0.2, 0.5, 0.8):
        mask = random.random((24, 31)) < share
        expected, _ = amg.remove_small_regions(mask, pixels, mode="holes")
        expected, _ = amg.remove_small_regions(expected, pixels, mode="islands")
        assert np.array_equal(without_small_regions(mask, pixels), expected)
