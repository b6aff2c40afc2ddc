"""COCO's three ways to write a mask: polygons, run lengths, and compressed run lengths."""

from __future__ import annotations

import ast
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_FLAT = 1e-6
"""Distance from a line, in pixels, up to which a point is on it."""


def plain_form(segmentation: Any) -> Any:
    """A segmentation as COCO writes it, of one that is written a little otherwise.

    So are one polygon that is in no list of polygons, points as pairs [x, y], a run-length encoding
    in a list, run lengths as 3.0, and compressed ones as Python shows bytes. What is none of these
    is given back itself.
    """
    if isinstance(segmentation, dict):
        return _plain_runs(segmentation)
    first = segmentation[0] if isinstance(segmentation, list) and segmentation else None
    if isinstance(first, dict) and len(segmentation) == 1:
        return _plain_runs(first)
    if isinstance(first, int | float):
        return [segmentation]
    if not isinstance(first, list) or not first:
        return segmentation
    if isinstance(first[0], list):
        return [_flattened(polygon) for polygon in segmentation]
    # As polygons they were single points.
    if len(first) == 2 and len(segmentation) > 2:
        flat = _flattened(segmentation)
        return segmentation if flat is segmentation else [flat]
    return segmentation


def _flattened(points: Any) -> Any:
    """x, y, x, y, ... of a list of pairs; anything else itself."""
    if isinstance(points, list) and all(isinstance(p, list) and len(p) == 2 for p in points):
        return list(itertools.chain.from_iterable(points))
    return points


def _plain_runs(encoded: dict[str, Any]) -> dict[str, Any]:
    counts = encoded.get("counts")
    if isinstance(counts, list) and float in map(type, counts):
        whole = [int(run) if isinstance(run, float) and run.is_integer() else run for run in counts]
        return {**encoded, "counts": whole}
    if isinstance(counts, str) and counts[:2] in ("b'", 'b"'):
        try:
            return {**encoded, "counts": ast.literal_eval(counts).decode("ascii")}
        except (ValueError, SyntaxError):
            return encoded
    return encoded


def segmentation_problem(segmentation: Any, height: int, width: int) -> str | None:
    """What makes a segmentation unusable for a picture of that size, or None."""
    if not segmentation:
        return "there is no segmentation"
    if isinstance(segmentation, list):
        usable = all(
            isinstance(p, list) and len(p) % 2 == 0 and are_numbers(p) for p in segmentation
        )
        return None if usable else "a polygon is not a list of at least three points x, y"
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        return "the segmentation is neither polygons nor a run-length encoding"
    if segmentation["size"] != [height, width]:
        return f"its mask has size {segmentation['size']}, not {[height, width]} (height, width)"
    counts = segmentation["counts"]
    runs = uncompress(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(isinstance(run, int) and run >= 0 for run in runs):
        return "its run lengths are not numbers of pixels"
    return None if sum(runs) == height * width else "its run lengths do not fill the picture"


def enclosing(polygons: Sequence[Sequence[float]]) -> list[Sequence[float]]:
    """The polygons without flat ones: of fewer than three points, or with all on one line.

    Args:
        polygons: of a usable segmentation.
    """
    return [polygon for polygon in polygons if not _is_flat(polygon)]


def _is_flat(polygon: Sequence[float]) -> bool:
    across, down = 0.0, 0.0
    # Mostly the third point decides: no slices, which would touch all of them.
    for place in range(2, len(polygon), 2):
        x, y = polygon[place] - polygon[0], polygon[place + 1] - polygon[1]
        if across == down == 0:
            across, down = x, y
        elif abs(across * y - down * x) > _FLAT * (abs(across) + abs(down)):
            return False
    return True


def bounding_box(segmentation: Any, height: int, width: int) -> list[float]:
    """x, y, width and height of the smallest box around a usable segmentation, in pixels."""
    if isinstance(segmentation, list):
        left = min(min(polygon[::2]) for polygon in segmentation)
        top = min(min(polygon[1::2]) for polygon in segmentation)
        right = max(max(polygon[::2]) for polygon in segmentation)
        bottom = max(max(polygon[1::2]) for polygon in segmentation)
        return [left, top, right - left, bottom - top]
    from pycocotools import mask as coco_mask

    encoded = encode_segmentation(segmentation, height, width)
    return [float(side) for side in coco_mask.toBbox(encoded)]


def encode_segmentation(segmentation: Any, height: int, width: int) -> Any:
    """Compressed run-length encoding, in pycocotools' form, of a usable segmentation."""
    from pycocotools import mask as coco_mask

    if isinstance(segmentation, list):
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return coco_mask.frPyObjects(segmentation, height, width)
    return segmentation


def encode_masks(masks: NDArray[np.bool_]) -> list[dict[str, Any]]:
    """Compressed run-length encodings, as JSON can hold, of masks [n, height, width]."""
    from pycocotools import mask as coco_mask

    if len(masks) == 0:
        return []
    encoded: Any = coco_mask.encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8)))
    return [
        {"size": [int(side) for side in one["size"]], "counts": one["counts"].decode("ascii")}
        for one in encoded
    ]


def decode_segmentation(segmentation: Any, height: int, width: int) -> NDArray[np.bool_]:
    """The mask, bool [height, width], of a usable segmentation."""
    from pycocotools import mask as coco_mask

    encoded = encode_segmentation(segmentation, height, width)
    drawn: NDArray[np.uint8] = coco_mask.decode(encoded)
    return drawn.astype(np.bool_)


def uncompress(counts: str) -> list[int] | None:
    """Run lengths of COCO's compressed text, or None where it is none.

    Each number is written in groups of 5 bits, lowest first, sign-extended; from the fourth on it
    is the difference to the number before the last. (pycocotools itself reads whatever text is
    given, and leaves pixels undefined that no run covers.)
    """
    symbols = np.frombuffer(counts.encode("ascii", "replace"), np.uint8).astype(np.int64) - 48
    if not symbols.size or symbols.min() < 0 or symbols.max() > 63 or symbols[-1] & 32:
        return None
    last = np.flatnonzero(symbols & 32 == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    groups = last - first + 1
    if groups.max() > 7:
        return None
    shifts = 5 * (np.arange(symbols.size) - np.repeat(first, groups))
    numbers = np.add.reduceat((symbols & 31) << shifts, first)
    numbers -= np.where(symbols[last] & 16, 1 << 5 * groups, 0)
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return [int(number) for number in numbers]


def are_numbers(values: Sequence[Any]) -> bool:
    """Whether all are finite numbers."""
    # No step in Python, for train2017 has 80 million numbers.
    try:
        return set(map(type, values)) <= {int, float} and all(map(math.isfinite, values))
    except OverflowError:
        return False
