"""Overlap of masks, one by one."""

from __future__ import annotations

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
