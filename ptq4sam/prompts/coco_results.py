"""Boxes from and to a COCO results file: what any detector can write."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq4sam.data.annotations import TEXT_NUMBERS, is_id, repair, some_names
from ptq4sam.data.boxes import ADVICE, suspicion
from ptq4sam.data.coco import CocoDataset
from ptq4sam.data.images import ImageRecord, ImageSet
from ptq4sam.data.segmentation import are_numbers
from ptq4sam.errors import DataError
from ptq4sam.files import read_json, write_json
from ptq4sam.prompts.agreement import Agreement
from ptq4sam.prompts.categories import COCO_CATEGORY_IDS
from ptq4sam.prompts.named import Names
from ptq4sam.prompts.record import NOT_A_NUMBER, Prompts, clean, some_ids, warn_of_categories

_log = logging.getLogger(__name__)

_IDS = {"image_id": "picture", "category_id": "category"}
_HIGHEST_SCORE = 1.01
_ENOUGH = 8
"""Categories of a file from which on it is no chance that all of 1203 are among COCO's 80 ids."""


class CocoResults:
    """Prompt source: boxes that a detector has written as COCO results.

    The file is a list of `{"image_id", "category_id", "bbox": [x, y, width, height], "score"}`.
    A picture that it does not name has no boxes. Boxes of pictures outside of the data set are not
    used: a data set may be a part of what the detector saw. Boxes of a category that the data set
    lacks cannot score, and equal results count as often as they are there: both with a warning, as
    boxes that do not look like x, y, width and height in pixels or lie where no annotated object
    is, and categories that these do not have. A result without a score has 1, as annotated boxes
    have. Pictures and categories may be named instead of numbered. An "id", which some writers give
    their results, means nothing here and may be there twice.

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
        content, self._digest = read_json(path, "file of boxes")
        entries = _listed(content, path)
        self._entries: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
        for entry in self._usable(entries, Names(dataset)):
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
            np.array(boxes, np.float64).reshape(-1, 4),
            [entry["score"] for entry in entries],
            [entry["category_id"] for entry in entries],
            self.limit,
            self.dropped,
        )

    def _usable(self, entries: list[Any], names: Names) -> Iterator[dict[str, Any]]:
        """The results that are made of numbers, in file order, each with a score."""
        text_number, unscored = None, 0
        for entry in entries:
            if isinstance(entry, dict):
                names.replace(entry)
        for number, entry in enumerate(entries):
            if isinstance(entry, dict) and names.is_of_another(entry):
                continue
            text = _check(entry, number, self.path)
            text_number = text_number or text
            unscored += "score" not in entry
            entry.setdefault("score", 1.0)
            if are_numbers([entry["score"], *entry["bbox"]]):
                yield entry
            else:
                self.dropped[NOT_A_NUMBER] += 1
        names.tell(self.path)
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
        self._check_meaning([r for r in dataset.images if r.id in self._entries], dataset)
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

    def _check_meaning(self, records: Sequence[ImageRecord], dataset: ImageSet) -> None:
        """Warn of boxes, categories and scores that do not look like what they should be."""
        boxes = [np.array([e["bbox"] for e in self._entries[r.id]], np.float64) for r in records]
        sizes = [
            np.array([[r.width, r.height]] * len(own), np.float64)
            for r, own in zip(records, boxes, strict=True)
        ]
        doubts: list[str | None] = [suspicion(np.concatenate(boxes), np.concatenate(sizes))]
        if isinstance(dataset, CocoDataset):
            categories = [
                np.array([e["category_id"] for e in self._entries[r.id]]) for r in records
            ]
            agreement = Agreement(dataset, zip(records, boxes, categories, strict=True))
            misplaced = agreement.misplaced()
            # What is seen without the truth asks a question, which this may answer.
            if misplaced is not None:
                doubts = [f"{doubts[0]}; {misplaced}" if doubts[0] else f"{misplaced} {ADVICE}"]
            doubts.append(agreement.miscategorized())
        for doubt in doubts:
            if doubt is not None:
                _log.warning("%s: %s", self.path, doubt)
        scores = [entry["score"] for record in records for entry in self._entries[record.id]]
        if min(scores) < 0 or max(scores) > _HIGHEST_SCORE:
            _log.warning(
                "%s: scores go from %g to %g: write probabilities, from 0 to 1 (boxes below the "
                "threshold, 0 as a rule, are not used)",
                self.path,
                min(scores),
                max(scores),
            )

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


def _listed(content: Any, path: Path) -> list[Any]:
    """The list of results that a file is.

    Raises:
        DataError: it is something else.
    """
    if isinstance(content, list):
        return content
    hint = ""
    if isinstance(content, dict):
        hint = f", but an object with {some_names(content)}"
        if "annotations" in content and "images" in content:
            hint += "; this looks like annotations"
    raise DataError(
        f"{path} is not a list of COCO results{hint}: write "
        '[{"image_id": 1, "category_id": 1, "bbox": [x, y, width, height], "score": 0.9}, ...]'
    )


def _check(entry: Any, number: int, path: Path) -> str | None:
    """Refuse what is no result; as `repair`, which is done in place."""
    if not isinstance(entry, dict):
        raise DataError(
            f"{path}: result {number} has no bbox [x, y, width, height], it is no object"
        )
    text = repair(entry, _IDS)
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        found = f"but {box!r:.60}" if "bbox" in entry else f"but {some_names(entry)}"
        raise DataError(f"{path}: result {number} has no bbox [x, y, width, height], {found}")
    for key, what in _IDS.items():
        if not is_id(entry.get(key)):
            raise DataError(
                f"{path}: result {number} has {key} {entry.get(key)!r:.60}, no whole number: write "
                f"the {what}'s id, as in the annotations"
            )
    if not _is_number(entry.get("score", 1.0)):
        raise DataError(
            f"{path}: result {number} has score {entry.get('score')!r:.60}, not a number"
        )
    return text


def _is_number(value: object) -> bool:
    # NaN is one here: detectors write it, and it is dropped.
    return isinstance(value, (int, float)) and not isinstance(value, bool)
