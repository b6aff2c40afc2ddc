"""Boxes that are not what they are read as: x, y, width, height in pixels of their picture."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Boxes = NDArray[np.float64]

_ADVICE = "Write [x, y, width, height] in pixels of the picture"


def suspicion(boxes: Boxes, sizes: Boxes) -> str | None:
    """What in boxes shows that they mean something else, and what to do; None if nothing does.

    Args:
        boxes: as written, [n, 4]; those that are not finite are passed over.
        sizes: width and height of each one's picture, [n, 2].
    """
    finite = np.isfinite(boxes).all(axis=1)
    boxes, sizes = boxes[finite], sizes[finite]
    if len(boxes) == 0:
        return None
    if np.abs(boxes).max() <= 1.01:
        return (
            f"all {len(boxes)} boxes lie within one pixel: are they fractions of the picture, as "
            f"YOLO's? {_ADVICE}"
        )
    over = int(_run_over(boxes, sizes).sum())
    if 2 * over > len(boxes):
        return (
            f"{over} of {len(boxes)} boxes run over the right or bottom border: are they "
            f"[x1, y1, x2, y2] (xyxy), or of pictures of another size? {_ADVICE}"
        )
    return None


def contradiction(boxes: Boxes, mask_boxes: Boxes, sizes: Boxes) -> tuple[NDArray[np.intp], str]:
    """Which boxes contradict their masks, and what they seem to be instead.

    Args:
        boxes: as written, [n, 4].
        mask_boxes: the boxes of the masks, [n, 4] x, y, width, height in pixels.
        sizes: width and height of each one's picture, [n, 2].

    Returns:
        Indices of the boxes whose IoU with the mask's box is below 0.5 and of which a side is more
        than 2 pixels away from the mask's; and for people how most of these are to be read, empty
        if they are few, or fit in no way that is known.
    """
    apart = np.abs(_corners(boxes) - _corners(mask_boxes)).max(axis=1, initial=0) > 2
    wrong = np.flatnonzero(apart & (_paired_iou(boxes, mask_boxes) < 0.5))
    if 10 * len(wrong) < len(boxes):
        return wrong, ""
    start, rest = boxes[wrong, :2], boxes[wrong, 2:]
    readings = {
        "[x1, y1, x2, y2] (xyxy)": np.hstack([start, rest - start]),
        "[centre x, centre y, width, height]": np.hstack([start - rest / 2, rest]),
    }
    for name, reading in list(readings.items()):
        readings[f"fractions {name}"] = reading * np.tile(sizes[wrong], 2)
    readings["fractions [x, y, width, height]"] = boxes[wrong] * np.tile(sizes[wrong], 2)
    for name, reading in readings.items():
        if 2 * (_paired_iou(reading, mask_boxes[wrong]) >= 0.5).sum() > len(wrong):
            return wrong, f"they fit as {name}. {_ADVICE}"
    return wrong, ""


def _run_over(boxes: Boxes, sizes: Boxes) -> NDArray[np.bool_]:
    """Which boxes reach a pixel or more over the right or bottom border.

    So does one around the middle of the picture that is written x1, y1, x2, y2, but for one that is
    exactly in the middle: it ends in the corner.
    """
    start, size = boxes[:, :2], boxes[:, 2:]
    over: NDArray[np.bool_] = np.any(start + size > sizes + 1, axis=1)
    into_corner: NDArray[np.bool_] = np.all(
        (start + size >= sizes) & (size > start) & (start > 0), axis=1
    )
    return over | into_corner


def _corners(boxes: Boxes) -> Boxes:
    return np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])


def _paired_iou(first: Boxes, second: Boxes) -> NDArray[np.float64]:
    """IoU of each box [n, 4] with the one in its place; 0 where both are empty."""
    one, other = _corners(first), _corners(second)
    low, high = np.maximum(one, other)[:, :2], np.minimum(one, other)[:, 2:]
    shared = (high - low).clip(min=0).prod(axis=1)
    areas = first[:, 2:].clip(min=0).prod(axis=1) + second[:, 2:].clip(min=0).prod(axis=1)
    united = areas - shared
    iou: NDArray[np.float64] = np.divide(
        shared, united, out=np.zeros_like(shared), where=united > 0
    )
    return iou
