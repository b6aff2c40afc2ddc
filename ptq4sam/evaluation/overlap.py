"""Overlap of masks, one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def mask_ious(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Intersection over union of each mask with its counterpart.

    Its mean is the mean IoU where one side is the ground truth, and the agreement where both are
    masks of two models for the same prompts.

    Args:
        first: bool [n, height, width].
        second: bool [n, height, width].

    Returns:
        [n] in 0-1; two empty masks agree: 1.

    Raises:
        ValueError: the shapes differ.
    """
    if first.shape != second.shape or first.ndim != 3:
        raise ValueError(f"masks of shapes {first.shape} and {second.shape} are not pairs")
    intersection = np.count_nonzero(first & second, axis=(1, 2))
    union = np.count_nonzero(first | second, axis=(1, 2))
    return np.where(union > 0, intersection / np.maximum(union, 1), 1.0)


def best_ious(
    objects: Sequence[dict[str, Any]], masks: Sequence[dict[str, Any]]
) -> NDArray[np.float64]:
    """IoU of each object with the mask that fits it best: how many objects are among masks.

    Args:
        objects: n compressed run-length encodings.
        masks: any number of them, of the same picture.

    Returns:
        [n] in 0-1; 0 without masks.
    """
    from pycocotools import mask as coco_mask

    if len(objects) == 0 or len(masks) == 0:
        return np.zeros(len(objects))
    overlaps = coco_mask.iou(list(masks), list(objects), [0] * len(objects))
    best: NDArray[np.float64] = overlaps.max(axis=0)
    return best
