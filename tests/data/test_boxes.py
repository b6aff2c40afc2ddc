from __future__ import annotations

import numpy as np
import pytest

from ptq4sam.data.boxes import contradiction, suspicion

SIZE = (96, 64)


def _random_boxes(count: int = 200) -> np.ndarray:
    """x, y, width, height of boxes all over a picture."""
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(0, SIZE, (count, 2, 2)), axis=1)
    return np.hstack([corners[:, 0], corners[:, 1] - corners[:, 0]])


def _as_corners(boxes: np.ndarray) -> np.ndarray:
    return np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])


def _sizes(boxes: np.ndarray) -> np.ndarray:
    return np.tile(np.array(SIZE, np.float64), (len(boxes), 1))


def _suspicion(boxes: list[list[float]] | np.ndarray) -> str:
    boxes = np.array(boxes, np.float64).reshape(-1, 4)
    return suspicion(boxes, _sizes(boxes)) or ""


def test_boxes_in_pixels_are_not_suspected() -> None:
    boxes = _random_boxes()
    assert _suspicion(boxes) == ""
    # Rounded up, and beside the border.
    assert _suspicion(np.ceil(boxes)) == ""
    whole = [[0, 0, *SIZE]] * 3
    assert _suspicion(whole) == ""
    assert _suspicion([[10, 20, 86, 44], [0, 3, 96, 61]]) == ""
    assert _suspicion([]) == ""


def test_corners_are_suspected() -> None:
    boxes = _as_corners(_random_boxes())
    assert "(xyxy)" in _suspicion(boxes)
    assert f"of {len(boxes)} boxes run over the right or bottom border" in _suspicion(boxes)
    # Exactly in the middle, such a box ends in the corner of the picture.
    assert "2 of 2 boxes" in _suspicion([[24, 16, 72, 48]] * 2)
    # Half of them is not enough.
    assert _suspicion([[30, 20, 80, 60], [30, 20, 10, 10]]) == ""


def test_fractions_are_suspected() -> None:
    boxes = _random_boxes() / np.tile(SIZE, 2)
    assert f"all {len(boxes)} boxes lie within one pixel" in _suspicion(boxes)
    assert _suspicion([*boxes.tolist(), [0, 0, 30, 30]]) == ""
    assert "within one pixel" in _suspicion([[np.nan, 0, 50, 50], [0.25, 0.25, 0.5, 0.5]])


@pytest.mark.parametrize(
    ("reading", "change"),
    [
        ("[x1, y1, x2, y2] (xyxy)", _as_corners),
        (
            "[centre x, centre y, width, height]",
            lambda b: np.hstack([b[:, :2] + b[:, 2:] / 2, b[:, 2:]]),
        ),
        ("fractions [x, y, width, height]", lambda b: b / np.tile(SIZE, 2)),
        ("fractions [x1, y1, x2, y2] (xyxy)", lambda b: _as_corners(b) / np.tile(SIZE, 2)),
        ("", lambda b: b[::-1]),
    ],
)
def test_a_mask_says_what_its_box_is(reading: str, change: object) -> None:
    boxes = _random_boxes()
    written = change(boxes)  # type: ignore[operator]
    wrong, told = contradiction(written, boxes, _sizes(boxes))
    assert len(wrong) > 50
    assert told == (f"they fit as {reading}. " + told.partition(". ")[2] if reading else "")


def test_boxes_a_little_beside_their_masks_do_not_contradict_them() -> None:
    boxes = _random_boxes()
    rng = np.random.default_rng(1)
    beside = boxes + rng.uniform(-0.5, 0.5, boxes.shape)
    assert len(contradiction(beside, boxes, _sizes(boxes))[0]) == 0
    few = boxes.copy()
    few[7] = [0, 0, 1, 1]
    wrong, told = contradiction(few, boxes, _sizes(boxes))
    assert wrong.tolist() == [7]
    assert told == ""
