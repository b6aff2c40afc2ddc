"""Boxes that are not what they are read as: x, y, width, height in pixels of their picture."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Boxes = NDArray[np.float64]

ADVICE = "Write [x, y, width, height] in pixels of the picture"
"""What to do with boxes that are written otherwise."""

POINTS_ADVICE = "Write x and y in pixels of the picture"
"""The same for points of polygons."""

SAME = 0.5
"""IoU from which on two boxes are about one object."""

_UNITS = {"": None, "fractions ": 1, "percent ": 100, "thousandths ": 1000}
"""What the numbers of a box may be of, and how many of it a picture's side has."""


def suspicion(boxes: Boxes, sizes: Boxes, polygons: bool = False) -> str | None:
    """What in boxes shows that they mean something else, and what to do; None if nothing does.

    Args:
        boxes: as written, [n, 4]; those that are not finite are passed over.
        sizes: width and height of each one's picture, [n, 2].
        polygons: the boxes are those of polygons, which have none of their own.
    """
    what, advice = ("polygons", POINTS_ADVICE) if polygons else ("boxes", ADVICE)
    finite = np.isfinite(boxes).all(axis=1)
    boxes, sizes = boxes[finite], sizes[finite]
    if len(boxes) == 0:
        return None
    if np.abs(boxes).max() <= 1.01:
        return (
            f"all {len(boxes)} {what} lie within one pixel: are they fractions of the picture, as "
            f"YOLO's? {advice}"
        )
    over = int(_run_over(boxes, sizes, into_corners=not polygons).sum())
    if 2 * over > len(boxes):
        written = "" if polygons else "[x1, y1, x2, y2] (xyxy), or "
        return (
            f"{over} of {len(boxes)} {what} run over the right or bottom border: are they "
            f"{written}of pictures of another size? {advice}"
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
    wrong = np.flatnonzero(apart & (iou(boxes, mask_boxes) < SAME))
    if 10 * len(wrong) < len(boxes):
        return wrong, ""
    for name, reading in readings(boxes[wrong], sizes[wrong]):
        if 2 * (iou(reading, mask_boxes[wrong]) >= SAME).sum() > len(wrong):
            or_masks = " (or the masks have y before x)" if name.startswith("[y") else ""
            return wrong, f"they fit as {name}{or_masks}. {ADVICE}"
    fractions = mask_boxes[wrong] * np.tile(sizes[wrong], 2)
    if 2 * (iou(boxes[wrong], fractions) >= SAME).sum() > len(wrong):
        return wrong, f"the polygons fit as fractions of the picture. {POINTS_ADVICE}"
    return wrong, ""


def readings(boxes: Boxes, sizes: Boxes) -> Iterator[tuple[str, Boxes]]:
    """Other ways in which four numbers are written for a box.

    Args:
        boxes: as written, [n, 4].
        sizes: width and height of each one's picture, [n, 2].

    Yields:
        The way's name, and what the boxes are then: x, y, width, height in pixels, [n, 4].
    """
    for unit, parts in _UNITS.items():
        scaled = boxes if parts is None else boxes * np.tile(sizes, 2) / parts
        start, rest = scaled[:, :2], scaled[:, 2:]
        forms = {
            "[x, y, width, height]": scaled,
            "[x1, y1, x2, y2] (xyxy)": np.hstack([start, rest - start]),
            "[centre x, centre y, width, height]": np.hstack([start - rest / 2, rest]),
        }
        for name, form in forms.items():
            if form is not boxes:
                yield f"{unit}{name}", form
    # Rows before columns, as arrays have them.
    start, rest = boxes[:, 1::-1], boxes[:, 3:1:-1]
    yield "[y, x, height, width]", np.hstack([start, rest])
    yield "[y1, x1, y2, x2]", np.hstack([start, rest - start])


def _run_over(boxes: Boxes, sizes: Boxes, into_corners: bool) -> NDArray[np.bool_]:
    """Which boxes reach a pixel or more over the right or bottom border, or into its corner.

    So does one around the middle of the picture that is written x1, y1, x2, y2, but for one that is
    exactly in the middle: it ends in the corner.
    """
    start, size = boxes[:, :2], boxes[:, 2:]
    over: NDArray[np.bool_] = np.any(start + size > sizes + 1, axis=1)
    if not into_corners:
        return over
    into_corner: NDArray[np.bool_] = np.all(
        (start + size >= sizes) & (size > start) & (start > 0), axis=1
    )
    return over | into_corner


def _corners(boxes: Boxes) -> Boxes:
    return np.concatenate([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], axis=-1)


def iou(first: Boxes, second: Boxes) -> NDArray[np.float64]:
    """IoU of boxes x, y, width, height, [..., 4], one by one; 0 where both are empty."""
    one, other = _corners(first), _corners(second)
    low = np.maximum(one[..., :2], other[..., :2])
    high = np.minimum(one[..., 2:], other[..., 2:])
    shared = (high - low).clip(min=0).prod(axis=-1)
    areas = first[..., 2:].clip(min=0).prod(axis=-1) + second[..., 2:].clip(min=0).prod(axis=-1)
    united = areas - shared
    found: NDArray[np.float64] = np.divide(
        shared, united, out=np.zeros_like(shared), where=united > 0
    )
    return found
