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
    segmentation_problem,
)

_log = logging.getLogger(__name__)

UNUSABLE = "unusable annotation"
NO_SEGMENTATION = "annotation without segmentation"
FLAT = "annotation of flat polygons"
"""Kinds of objects that cannot be used. Those of the last are never an error."""


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
        self._flat_polygons = 0
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
            raise UnusableObject(UNUSABLE, f"no category {category!r}")
        complete = {"iscrowd": 0, **annotation}
        if complete["iscrowd"] not in (0, 1):
            raise UnusableObject(UNUSABLE, f"iscrowd is {complete['iscrowd']!r}, not 0 or 1")
        segmentation = complete.pop("segmentation", None)
        segmentation = self._usable(segmentation, record, has_box="bbox" in complete)
        if segmentation is not None:
            complete["segmentation"] = segmentation
        _derive(complete, record)
        if not are_numbers([complete["area"]]):
            raise UnusableObject(UNUSABLE, f"area is {complete['area']!r}, not a number")
        if "bbox" in annotation and len(self._ids) < MOST_BOXES:
            self._ids.append(complete["id"])
            self._boxes.append(complete["bbox"])
            self._mask_boxes.append(
                None if segmentation is None else bounding_box(segmentation, *_size(record))
            )
            self._sizes.append((record.width, record.height))
        return complete

    def tell(self) -> None:
        """Log what was dropped, and whether the boxes are what they should be."""
        if self._flat_polygons:
            _log.info(
                "%s: dropped %d polygons of less than three points or on one line",
                self._path,
                self._flat_polygons,
            )
        if not self._ids:
            return
        masked = np.array([box is not None for box in self._mask_boxes])
        ids, boxes = np.array(self._ids), np.array(self._boxes, np.float64)
        sizes = np.array(self._sizes, np.float64)
        mask_boxes = np.array([box for box in self._mask_boxes if box is not None], np.float64)
        wrong, reading = contradiction(boxes[masked], mask_boxes.reshape(-1, 4), sizes[masked])
        told = reading or suspicion(boxes, sizes)
        if len(wrong):
            told = (
                f"{len(wrong)} of {masked.sum()} boxes contradict their masks, first that of "
                f"annotation id {ids[masked][wrong[0]]}: {told or 'correct bbox, or leave it out'}"
            )
        if told:
            _log.warning("%s: %s", self._path, told)

    def _usable(self, segmentation: Any, record: ImageRecord, has_box: bool) -> Any:
        """The usable part of a segmentation; None where there is none and none is needed."""
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
