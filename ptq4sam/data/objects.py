"""Annotated objects: what COCO lets one derive is completed, what cannot be used is refused."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ptq4sam.data.boxes import contradiction, suspicion
from ptq4sam.data.images import ImageRecord
from ptq4sam.data.segmentation import (
    are_numbers,
    bounding_box,
    enclosing,
    encode_segmentation,
    plain_form,
    segmentation_problem,
)

_log = logging.getLogger(__name__)

UNUSABLE = "unusable annotation"
NO_SEGMENTATION = "annotation without segmentation"
FLAT = "annotation of flat polygons"
"""Kinds of objects that cannot be used. Those of the last are never an error."""


_CORRECT = "correct bbox (it may be left out) or the segmentation (run lengths go down the columns)"
_NAMED_AT_ONCE = 8

MOST_BOXES = 20_000
"""So many boxes of a file are compared with their masks: train2017 has 860,000."""


class UnusableObject(Exception):
    """An annotation cannot be used; `kind` says why in general, the message in particular."""

    def __init__(self, kind: str, problem: str) -> None:
        super().__init__(problem)
        self.kind = kind


class AnnotatedObjects:
    """Completes the annotations of one file, and remembers what is odd about them.

    Args:
        path: of the file, for messages.
        category_names: the known categories by id.
        masks: whether an object needs a mask; where it does not, a box is enough.
    """

    def __init__(self, path: Path, category_names: Mapping[int, str], masks: bool) -> None:
        self._path, self._category_names, self._masks = path, category_names, masks
        self._flat_polygons = self._rewritten = self._without_area = 0
        self._keys: list[tuple[Any, ...]] = []
        # Boxes of polygons whose objects have none, and sizes of their pictures.
        self._outlines: list[list[float]] = []
        self._outline_sizes: list[tuple[int, int]] = []
        # Of the first annotations that have a box; the mask's is None where there is no mask.
        self._ids: list[int] = []
        self._boxes: list[list[float]] = []
        self._mask_boxes: list[list[float] | None] = []
        self._sizes: list[tuple[int, int]] = []

    def complete(self, annotation: Mapping[str, Any], record: ImageRecord) -> dict[str, Any]:
        """The annotation with crowd flag, area and box, and without flat polygons.

        It has no segmentation where there is none that is usable and none is needed.

        Raises:
            UnusableObject: it cannot be used.
        """
        category = annotation.get("category_id")
        if not isinstance(category, int) or category not in self._category_names:
            known = ", ".join(map(str, list(self._category_names)[:_NAMED_AT_ONCE]))
            raise UnusableObject(UNUSABLE, f"no category {category!r}, there are {known}")
        complete = {"iscrowd": 0, **annotation}
        if complete.get("bbox") == []:
            del complete["bbox"]
        if are_numbers([complete.get("area")]) and complete["area"] <= 0:
            # As tools write it that do not compute areas; APs would count every object as small.
            del complete["area"]
            self._without_area += 1
        has_box = "bbox" in complete
        if complete["iscrowd"] not in (0, 1):
            raise UnusableObject(UNUSABLE, f"iscrowd is {complete['iscrowd']!r}, not 0 or 1")
        segmentation = complete.pop("segmentation", None)
        segmentation = self._usable(segmentation, record, has_box)
        if segmentation is not None:
            complete["segmentation"] = segmentation
        _derive(complete, record)
        if not are_numbers([complete["area"]]):
            raise UnusableObject(UNUSABLE, f"area is {complete['area']!r}, not a number")
        self._remember(complete, record, has_box)
        return complete

    def _remember(self, complete: dict[str, Any], record: ImageRecord, has_box: bool) -> None:
        """Keep what `tell` looks at."""
        if len(self._keys) == MOST_BOXES:
            return
        segmentation = complete.get("segmentation")
        key = (record.id, complete["category_id"], complete["area"], *complete["bbox"])
        self._keys.append(key)
        if has_box:
            self._ids.append(complete["id"])
            self._boxes.append(complete["bbox"])
            self._mask_boxes.append(
                None if segmentation is None else bounding_box(segmentation, *_size(record))
            )
            self._sizes.append((record.width, record.height))
        elif isinstance(segmentation, list):
            self._outlines.append(bounding_box(segmentation, *_size(record)))
            self._outline_sizes.append((record.width, record.height))

    def tell(self) -> None:
        """Log what was dropped or read otherwise, and whether objects are what they should be."""
        if self._rewritten:
            _log.info(
                "%s: %d segmentations are not quite in COCO's form, "
                "[[x1, y1, x2, y2, ...], ...] or run lengths; they are understood",
                self._path,
                self._rewritten,
            )
        if self._without_area:
            _log.info(
                "%s: %d areas are 0 or less: computed from the masks",
                self._path,
                self._without_area,
            )
        repeated = len(self._keys) - len(set(self._keys))
        if repeated:
            _log.warning(
                "%s: %d annotations are there before, with the same picture, category, bbox and "
                "area: each counts as an object; was it put together from parts that overlap?",
                self._path,
                repeated,
            )
        if self._flat_polygons:
            _log.info(
                "%s: dropped %d polygons of less than three points or on one line",
                self._path,
                self._flat_polygons,
            )
        if self._outlines:
            outlines = np.array(self._outlines, np.float64)
            sizes = np.array(self._outline_sizes, np.float64)
            odd = suspicion(outlines, sizes, polygons=True)
            if odd:
                _log.warning("%s: %s", self._path, odd)
        if self._ids:
            self._tell_of_boxes()

    def _tell_of_boxes(self) -> None:
        masked = np.array([box is not None for box in self._mask_boxes])
        ids, boxes = np.array(self._ids), np.array(self._boxes, np.float64)
        sizes = np.array(self._sizes, np.float64)
        mask_boxes = np.array([box for box in self._mask_boxes if box is not None], np.float64)
        wrong, reading = contradiction(boxes[masked], mask_boxes.reshape(-1, 4), sizes[masked])
        told = reading or suspicion(boxes, sizes)
        if len(wrong):
            told = (
                f"{len(wrong)} of {masked.sum()} boxes contradict their masks, first that of "
                f"annotation id {ids[masked][wrong[0]]}: {told or _CORRECT}"
            )
        if told:
            _log.warning("%s: %s", self._path, told)

    def _usable(self, segmentation: Any, record: ImageRecord, has_box: bool) -> Any:
        """The usable part of a segmentation; None where there is none and none is needed."""
        plain = plain_form(segmentation)
        self._rewritten += plain is not segmentation
        segmentation = plain
        if isinstance(segmentation, list):
            segmentation = [polygon for polygon in segmentation if polygon != []]
        kind = UNUSABLE if segmentation else NO_SEGMENTATION
        problem = segmentation_problem(segmentation, *_size(record))
        if problem is None and isinstance(segmentation, list):
            every, segmentation = segmentation, enclosing(segmentation)
            self._flat_polygons += len(every) - len(segmentation)
            if not segmentation:
                kind, problem = FLAT, "no polygon encloses anything"
        if problem is None:
            return segmentation
        if has_box and not self._masks:
            return None
        if kind == NO_SEGMENTATION:
            problem += ", which scores need; to calibrate, a bbox is enough"
        raise UnusableObject(kind, problem)


def _derive(annotation: dict[str, Any], record: ImageRecord) -> None:
    """Complete area and box.

    Raises:
        UnusableObject: the box is none.
    """
    if "segmentation" in annotation and not {"area", "bbox"} <= annotation.keys():
        from pycocotools import mask as coco_mask

        encoded = encode_segmentation(annotation["segmentation"], *_size(record))
        annotation.setdefault("area", float(coco_mask.area(encoded)))
        annotation.setdefault("bbox", [float(side) for side in coco_mask.toBbox(encoded)])
    box = annotation["bbox"]
    if not (isinstance(box, list) and len(box) == 4 and are_numbers(box)):
        raise UnusableObject(UNUSABLE, f"bbox is {box!r}, not [x, y, width, height]")
    annotation.setdefault("area", box[2] * box[3])


def _size(record: ImageRecord) -> tuple[int, int]:
    return record.height, record.width
