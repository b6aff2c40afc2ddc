from __future__ import annotations

import numpy as np
import pytest

from ptq4sam.evaluation import best_ious, encode_masks, mask_ious, mean_iou_by_size


def _square(x: int, y: int, side: int) -> np.ndarray:
    mask = np.zeros((20, 30), np.bool_)
    mask[y : y + side, x : x + side] = True
    return mask


def test_overlap_of_pairs() -> None:
    first = np.stack([_square(0, 0, 10), _square(0, 0, 10), _square(0, 0, 4)])
    second = np.stack([_square(0, 0, 10), _square(5, 0, 10), _square(10, 10, 4)])
    assert mask_ious(first, second).tolist() == pytest.approx([1, 50 / 150, 0])
    assert np.array_equal(mask_ious(first, second), mask_ious(second, first))


def test_two_empty_masks_agree_and_an_empty_one_agrees_with_no_other() -> None:
    empty, full = np.zeros((1, 20, 30), np.bool_), np.ones((1, 20, 30), np.bool_)
    assert mask_ious(empty, empty).tolist() == [1]
    assert mask_ious(empty, full).tolist() == [0]


def test_no_masks() -> None:
    nothing = np.zeros((0, 20, 30), np.bool_)
    assert mask_ious(nothing, nothing).shape == (0,)


def test_what_is_no_pair_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 20, 30\) and \(3, 20, 30\) are not pairs"):
        mask_ious(np.zeros((2, 20, 30), np.bool_), np.zeros((3, 20, 30), np.bool_))
    with pytest.raises(ValueError, match="not pairs"):
        mask_ious(np.zeros((20, 30), np.bool_), np.zeros((20, 30), np.bool_))


def test_objects_have_the_iou_of_the_mask_that_fits_best() -> None:
    masks = np.zeros((3, 4, 6), bool)
    masks[0, :2, :2] = masks[1, :2, :3] = masks[2, 3, 3:] = True
    objects = np.zeros((2, 4, 6), bool)
    objects[0, :2, :4] = objects[1, 3, 5:] = True
    found = best_ious(encode_masks(objects), encode_masks(masks))
    assert found.tolist() == pytest.approx([6 / 8, 1 / 3])
    assert best_ious(encode_masks(objects), []).tolist() == [0, 0]
    assert best_ious([], encode_masks(masks)).tolist() == []


def test_mean_iou_by_size_counts_an_object_on_a_limit_twice() -> None:
    """By hand: 1024 and 9216 pixels are the limits, and belong to both sizes beside them."""
    areas = [1, 1023.5, 1024, 1025, 9215, 9216, 9216.5, 40000]
    ious = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.9]
    found = mean_iou_by_size(ious, areas)
    assert found == pytest.approx(
        {
            "mean_iou": 3.7 / 8,
            "mean_iou_small": (0.1 + 0.2 + 0.3) / 3,
            "mean_iou_medium": (0.3 + 0.4 + 0.5 + 0.6) / 4,
            "mean_iou_large": (0.6 + 0.7 + 0.9) / 3,
        }
    )


def test_a_size_without_objects_has_no_mean() -> None:
    found = mean_iou_by_size([0.5, 1], [10, 20])
    assert found["mean_iou"] == found["mean_iou_small"] == 0.75
    assert np.isnan([found["mean_iou_medium"], found["mean_iou_large"]]).all()
    assert np.isnan(list(mean_iou_by_size([], []).values())).all()
    with pytest.raises(ValueError, match="2 IoUs of objects with 1 areas"):
        mean_iou_by_size([0.5, 1], [10])
