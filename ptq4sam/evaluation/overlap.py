"""Overlap of masks, one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

MEAN_IOU = "mean_iou"
SMALL, LARGE = 32**2, 96**2
"""Limits of the sizes of objects in pixels of area, as COCO has them."""
SIZES = {"small": (0, SMALL), "medium": (SMALL, LARGE), "large": (LARGE, math.inf)}


def mean_iou_by_size(ious: ArrayLike, areas: ArrayLike) -> dict[str, float]:
    """Mean IoU of all objects and of those of each size.

    As EfficientViT-SAM and the study of its quantization count (Bengs and Ryhede Bengtsson, 2024):
    every object weighs the same, and both limits of a size belong to it, so that one of exactly
    1024 or 9216 pixels is of two sizes.

    Args:
        ious: of the objects' masks with the truth, [n] in 0-1.
        areas: of the objects as annotated, in pixels [n].

    Returns:
        mean_iou, mean_iou_small, mean_iou_medium, mean_iou_large in 0-1; NaN where there is none.

    Raises:
        ValueError: there are not as many areas as IoUs.
    """
    values, pixels = np.asarray(ious, np.float64), np.asarray(areas, np.float64)
    if values.shape != pixels.shape:
        raise ValueError(f"{values.size} IoUs of objects with {pixels.size} areas")
    groups = {MEAN_IOU: values}
    for size, (low, high) in SIZES.items():
        groups[f"{MEAN_IOU}_{size}"] = values[(pixels >= low) & (pixels <= high)]
    return {name: float(group.mean()) if group.size else math.nan for name, group in groups.items()}


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
