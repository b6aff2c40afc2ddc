"""What detectors need of files and boxes."""

from __future__ import annotations

import hashlib
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from ptq4sam.downloads import Missing
from ptq4sam.errors import CheckpointError, DependencyError


def file_digest(path: Path) -> str:
    """Identifies a weight file by its bytes.

    Raises:
        CheckpointError: it is missing, which says where it comes from, or cannot be read.
    """
    missing = Missing()
    missing.look_for("detector", path)
    missing.report()
    try:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise CheckpointError(f"detector file {path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()[:16]


def package_version(name: str, install: str) -> str:
    """Version of the package that a kind of prompts is named after.

    Args:
        name: of both.
        install: the command that installs the package.

    Raises:
        DependencyError: it is not installed.
    """
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError as error:
        raise DependencyError(
            f"prompts of {name}:... need {name}, which is not installed here: {install}"
        ) from error


def candidates(scores: Tensor, threshold: float) -> Tensor:
    """Which detections [n] are used: all but those at or below the threshold.

    A score that is not a number is none of these: it stays, so that `clean` drops and counts it.
    """
    return ~(scores <= threshold)


def suppress(
    boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, limit: int
) -> Tensor:
    """Non-maximum suppression within each class.

    Detections with a number that is none suppress nothing and stand behind all others, whatever the
    limit, so that `clean` drops and counts them.

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
    finite = boxes.isfinite().all(dim=1) & scores.isfinite()
    usable = finite.nonzero()[:, 0]
    kept = batched_nms(boxes[usable], scores[usable], labels[usable], iou_threshold)[:limit]
    return torch.cat([usable[kept], (~finite).nonzero()[:, 0]])
