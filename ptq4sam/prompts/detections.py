"""What detectors need of files and boxes."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import Tensor

from ptq4sam.errors import CheckpointError, DependencyError


def file_digest(path: Path) -> str:
    """Identifies a weight file by its bytes.

    Raises:
        CheckpointError: it is missing or cannot be read.
    """
    try:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise CheckpointError(f"detector file {path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()[:16]


def suppress(
    boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, limit: int
) -> Tensor:
    """Non-maximum suppression within each class.

    Args:
        boxes: xyxy [n, 4].
        scores: [n].
        labels: [n].
        iou_threshold: a box that overlaps a better one of its class by more is dropped.
        limit: keep at most so many.

    Returns:
        Indices of the kept boxes, best first.

    Raises:
        DependencyError: torchvision is not installed.
    """
    try:
        from torchvision.ops import batched_nms
    except ImportError as error:
        raise DependencyError(
            "detectors need torchvision, which is not installed here: pip install torchvision"
        ) from error
    kept: Tensor = batched_nms(boxes, scores, labels, iou_threshold)
    return kept[:limit]
