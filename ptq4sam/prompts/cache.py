"""Detections are computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq4sam.data.images import ImageRecord, ImageSet
from ptq4sam.errors import DataError
from ptq4sam.files import write_json
from ptq4sam.prompts.coco_results import CocoResults
from ptq4sam.prompts.ground_truth import GroundTruth
from ptq4sam.prompts.record import Prompts, PromptSource

_log = logging.getLogger(__name__)


def cached(source: PromptSource, dataset: ImageSet, cache_dir: Path) -> PromptSource:
    """The source, remembering its boxes on disk where finding them takes more than reading them."""
    if isinstance(source, (CocoResults, GroundTruth)):
        return source
    return CachedPrompts(source, dataset, cache_dir)


class CachedPrompts:
    """Prompt source: another source's boxes, kept as one JSON file a picture.

    The folder's name is a fingerprint of source and data set; each file also names the pixels that
    it is about. So a crash loses nothing, runs may share the folder, any part of a data set may be
    asked for, and a changed picture is detected anew.

    Args:
        source: is asked for what is not there yet.
        dataset: what the pictures belong to.
        cache_dir: receives one folder for each source and data set.
    """

    def __init__(self, source: PromptSource, dataset: ImageSet, cache_dir: Path) -> None:
        self.source = source
        key = f"{source.fingerprint()} {dataset.fingerprint()}".encode()
        digest = hashlib.sha256(key).hexdigest()[:16]
        self.folder = cache_dir / f"{source.name.replace(' ', '-')}-{digest}"

    @property
    def name(self) -> str:
        """The source's name."""
        return self.source.name

    def fingerprint(self) -> str:
        """The source's fingerprint."""
        return self.source.fingerprint()

    def prompts(self, record: ImageRecord, image: NDArray[np.uint8]) -> Prompts:
        """The source's boxes, from disk where they are there already."""
        path = self.folder / f"{record.id}.json"
        pixels = _digest(image)
        if path.exists():
            try:
                kept = _parse(json.loads(path.read_bytes()), record.id, pixels)
            except (OSError, ValueError, KeyError, TypeError, DataError) as error:
                _log.warning("detections in %s are damaged (%s): detecting again", path, error)
            else:
                if kept is not None:
                    return kept
        found = self.source.prompts(record, image)
        content = {
            "pixels": pixels,
            "boxes": found.boxes.tolist(),
            "scores": found.scores.tolist(),
            "category_ids": found.category_ids.tolist(),
        }
        write_json(content, path, compact=True)
        return found


def _parse(content: Any, image_id: int, pixels: str) -> Prompts | None:
    """The kept boxes, or None where they are of other pixels."""
    if content["pixels"] != pixels:
        return None
    found = Prompts(image_id, content["boxes"], content["scores"], content["category_ids"])
    if not (np.isfinite(found.boxes).all() and np.isfinite(found.scores).all()):
        raise ValueError("a box is not a number")
    return found


def _digest(image: NDArray[np.uint8]) -> str:
    return hashlib.blake2b(
        np.ascontiguousarray(image).data, digest_size=16, salt=str(image.shape).encode()[:16]
    ).hexdigest()
