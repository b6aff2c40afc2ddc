from __future__ import annotations

import numpy as np
import pytest

from ptq4sam.evaluation import best_ious, encode_masks, mask_ious


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
