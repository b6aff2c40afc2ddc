"""Detections are computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq4sam.data.images import ImageRecord, ImageSet
from ptq4sam.errors import DataError, in_one_line
from ptq4sam.files import write_json
from ptq4sam.prompts.coco_results import CocoResults
from ptq4sam.prompts.ground_truth import GroundTruth
from ptq4sam.prompts.record import Prompts, PromptSource

_log = logging.getLogger(__name__)


SHARED = Path("work_dirs/prompts")
"""Folder that all commands in one current folder share."""


class CacheFolders:
    """Folders that boxes are kept in: read from all, written to the first that lets itself be.

    Where none does, only time is lost. What was refused is told once.

    Args:
        folders: in the order in which they are tried.
    """

    def __init__(self, *folders: Path) -> None:
        self._folders = tuple(dict.fromkeys(folders))
        self._writable = list(self._folders)

    @classmethod
    def beside(cls, folder: Path) -> CacheFolders:
        """Those of a command that writes into a folder: the shared one, else one in that folder."""
        return cls(SHARED, folder / SHARED.name)

    def having(self, name: str) -> Path | None:
        """The file of a name in the first folder that has it."""
        # Not Path.exists, which fails in a folder of somebody else.
        return next(
            (path for folder in self._folders if os.path.exists(path := folder / name)), None
        )

    def write(self, content: object, name: str) -> None:
        """Keep something, where that is possible."""
        refused = []
        while self._writable:
            try:
                write_json(content, self._writable[0] / name, compact=True)
                break
            except OSError as error:
                refused.append(in_one_line(error))
                del self._writable[0]
        if refused:
            where = f"are kept in {self._writable[0]}" if self._writable else "are not kept"
            _log.warning("detections %s (%s)", where, "; ".join(refused))


def cached(source: PromptSource, dataset: ImageSet, folders: CacheFolders | Path) -> PromptSource:
    """The source, remembering its boxes on disk where finding them takes more than reading them.

    Args:
        source: finds them.
        dataset: what the pictures belong to.
        folders: where they are kept, or the only folder.
    """
    if isinstance(source, (CocoResults, GroundTruth)):
        return source
    if isinstance(folders, Path):
        folders = CacheFolders(folders)
    return CachedPrompts(source, dataset, folders)


class CachedPrompts:
    """Prompt source: another source's boxes, kept as one JSON file a picture.

    The folder's name is a fingerprint of source and data set; each file also names the pixels that
    it is about. So a crash loses nothing, runs may share the folder, any part of a data set may be
    asked for, and a changed picture is detected anew.

    Args:
        source: is asked for what is not there yet.
        dataset: what the pictures belong to.
        folders: receive one folder for each source and data set.
    """

    def __init__(self, source: PromptSource, dataset: ImageSet, folders: CacheFolders) -> None:
        self.source, self._folders = source, folders
        key = f"{source.fingerprint()} {dataset.fingerprint()}".encode()
        digest = hashlib.sha256(key).hexdigest()[:16]
        # A detector may be named by a path, and Windows forbids more than a slash.
        self._own = f"{re.sub(r'[^0-9A-Za-z._-]', '-', source.name)}-{digest}"

    @property
    def name(self) -> str:
        """The source's name."""
        return self.source.name

    def fingerprint(self) -> str:
        """The source's fingerprint."""
        return self.source.fingerprint()

    def prompts(self, record: ImageRecord, image: NDArray[np.uint8]) -> Prompts:
        """The source's boxes, from disk where they are there already."""
        name = f"{self._own}/{record.id}.json"
        pixels = _digest(image)
        path = self._folders.having(name)
        if path is not None:
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
        self._folders.write(content, name)
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
