"""Boxes from and to a COCO results file: what any detector can write."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq4sam.data.annotations import TEXT_NUMBERS, repair
from ptq4sam.data.boxes import suspicion
from ptq4sam.data.images import ImageRecord, ImageSet
from ptq4sam.data.segmentation import are_numbers
from ptq4sam.errors import DataError
from ptq4sam.files import read_json, write_json
from ptq4sam.prompts.categories import COCO_CATEGORY_IDS
from ptq4sam.prompts.record import NOT_A_NUMBER, Prompts, clean, some_ids, warn_of_categories

_log = logging.getLogger(__name__)

_IDS = ("image_id", "category_id")
_ENOUGH = 8
"""Categories of a file from which on it is no chance that all of 1203 are among COCO's 80 ids."""


class CocoResults:
    """Prompt source: boxes that a detector has written as COCO results.

    The file is a list of `{"image_id", "category_id", "bbox": [x, y, width, height], "score"}`.
    A picture that it does not name has no boxes. Boxes of pictures outside of the data set are not
    used: a data set may be a part of what the detector saw. Boxes of a category that the data set
    lacks cannot score, and equal results count as often as they are there: both with a warning, as
    boxes that do not look like x, y, width and height in pixels. A result without a score has 1, as
    annotated boxes have. An "id", which some writers give their results, means nothing here and may
    be there twice.

    Args:
        path: the file.
        dataset: what it is about.
        limit: use at most so many boxes of a picture, best first; None for all, of which
            `Prompting.max_per_image` are used.

    Raises:
        DataError: the file is missing or damaged, is no list of results, or belongs to other
            pictures or categories.
    """

    name = "COCO results"

    def __init__(self, path: Path, dataset: ImageSet, limit: int | None = None) -> None:
        self.path = path
        self.limit = limit
        self.dropped: Counter[str] = Counter()
        entries, self._digest = read_json(path, "file of boxes")
        if not isinstance(entries, list):
            annotations = isinstance(entries, dict) and "annotations" in entries
            hint = "; this looks like annotations" if annotations else ""
            raise DataError(f"{path} is not a list of COCO results{hint}")
        self._entries: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
        for entry in self._usable(entries):
            self._entries[entry["image_id"]].append(entry)
        self._check_fit(dataset)

    def fingerprint(self) -> str:
        """Identifies the file by its bytes."""
        return f"{self._digest}-{self.limit}"

    def prompts(self, record: ImageRecord, image: NDArray[np.uint8]) -> Prompts:
        """The file's boxes of a picture; the pixels are not looked at."""
        entries = self._entries.get(record.id, [])
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (entry["bbox"] for entry in entries)]
        return clean(
            record,
            np.array(boxes, np.float32).reshape(-1, 4),
            [entry["score"] for entry in entries],
            [entry["category_id"] for entry in entries],
            self.limit,
            self.dropped,
        )

    def _usable(self, entries: list[Any]) -> Iterator[dict[str, Any]]:
        """The results that are made of numbers, in file order, each with a score."""
        text_number, unscored = None, 0
        for number, entry in enumerate(entries):
            text = _check(entry, number, self.path)
            text_number = text_number or text
            unscored += "score" not in entry
            entry.setdefault("score", 1.0)
            if are_numbers([entry["score"], *entry["bbox"]]):
                yield entry
            else:
                self.dropped[NOT_A_NUMBER] += 1
        if text_number is not None:
            _log.info(TEXT_NUMBERS, self.path, text_number)
        if unscored:
            _log.info(
                "%s: %d of %d results have no score: each counts as 1",
                self.path,
                unscored,
                len(entries),
            )
        for reason, count in self.dropped.items():
            _log.warning("%s: dropped %d x %s", self.path, count, reason)

    def _check_fit(self, dataset: ImageSet) -> None:
        if not self._entries:
            _log.warning(
                "%s has no boxes at all: nothing is segmented, and every object counts as missed",
                self.path,
            )
            return
        here = [record.id for record in dataset.images if record.id in self._entries]
        if not here:
            raise DataError(
                f"{self.path} has boxes of {len(self._entries)} images, none of which is among "
                f"the {len(dataset.images)} images used: give the boxes of these images"
            )
        if len(here) < len(dataset.images):
            _log.warning(
                "%s has no boxes for %d of %d pictures: their objects count as missed",
                self.path,
                len(dataset.images) - len(here),
                len(dataset.images),
            )
        self._check_meaning([record for record in dataset.images if record.id in self._entries])
        repeated = self._repeated(here)
        if repeated:
            _log.warning(
                "%s: %d results are there before, with the same box, category and score: all are "
                "used, and AP counts the repeated ones as wrong; was it put together from "
                "parts that overlap?",
                self.path,
                repeated,
            )
        self._check_owner(dataset)
        known = set(dataset.category_ids)
        used = Counter(entry["category_id"] for id_ in here for entry in self._entries[id_])
        if known and known.isdisjoint(used):
            raise DataError(
                f"{self.path} has category ids {some_ids(used)}, the data set has "
                f"{some_ids(known)}: write the data set's ids"
            )
        warn_of_categories(str(self.path), used, dataset)

    def _check_owner(self, dataset: ImageSet) -> None:
        """Refuse COCO's boxes on LVIS and LVIS's on COCO: they share pictures and numbers."""
        every = Counter(e["category_id"] for entries in self._entries.values() for e in entries)
        known, coco = set(dataset.category_ids), set(COCO_CATEGORY_IDS)
        foreign = sum(count for id_, count in every.items() if id_ not in known)
        if known == coco and 2 * foreign > sum(every.values()):
            raise DataError(
                f"{self.path} is of another data set: most of its boxes have categories that COCO "
                f"lacks ({some_ids(set(every) - known)}): give boxes of COCO's categories"
            )
        is_lvis = len(known) > 10 * len(coco)
        if is_lvis and len(every) >= _ENOUGH and every.keys() <= coco:
            raise DataError(
                f"{self.path} is of another data set: its categories are COCO's "
                f"({some_ids(every)}), the pictures have LVIS's {len(known)}: give boxes of those"
            )

    def _check_meaning(self, records: Iterable[ImageRecord]) -> None:
        pairs = [
            (entry["bbox"], (record.width, record.height))
            for record in records
            for entry in self._entries[record.id]
        ]
        boxes, sizes = (np.array(values, np.float64) for values in zip(*pairs, strict=True))
        odd = suspicion(boxes, sizes)
        if odd is not None:
            _log.warning("%s: %s", self.path, odd)

    def _repeated(self, image_ids: Iterable[int]) -> int:
        """How many results equal an earlier one."""
        return sum(
            len(entries) - len({(e["category_id"], e["score"], *e["bbox"]) for e in entries})
            for entries in (self._entries[image_id] for image_id in image_ids)
        )


def to_results(prompts: Prompts) -> list[dict[str, Any]]:
    """The boxes of a picture as COCO results."""
    corners = prompts.boxes.astype(np.float64)
    sizes = corners[:, 2:] - corners[:, :2]
    return [
        {
            "image_id": prompts.image_id,
            "category_id": int(category),
            "bbox": [*map(float, corner), *map(float, size)],
            "score": float(score),
        }
        for corner, size, score, category in zip(
            corners[:, :2], sizes, prompts.scores, prompts.category_ids, strict=True
        )
    ]


def write_results(prompts: Iterable[Prompts], path: Path) -> None:
    """Write the boxes of many pictures as a COCO results file, at once or not at all."""
    write_json([result for one in prompts for result in to_results(one)], path)


def _check(entry: Any, number: int, path: Path) -> str | None:
    """Refuse what is no result; as `repair`, which is done in place."""
    text = repair(entry, _IDS) if isinstance(entry, dict) else None
    box = entry.get("bbox") if isinstance(entry, dict) else None
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise DataError(f"{path}: result {number} has no bbox [x, y, width, height]")
    for key in _IDS:
        if not isinstance(entry.get(key), int):
            raise DataError(f"{path}: result {number} has {key} {entry.get(key)!r}, not a number")
    if not _is_number(entry.get("score", 1.0)):
        raise DataError(f"{path}: result {number} has score {entry.get('score')!r}, not a number")
    return text


def _is_number(value: object) -> bool:
    # NaN is one here: detectors write it, and it is dropped.
    return isinstance(value, (int, float)) and not isinstance(value, bool)
