"""Whether boxes that somebody wrote are about the annotated objects of the same pictures.

Boxes in another form, of other pictures or under other categories cost no error, but all of AP.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ptq4sam.data.boxes import SAME, Boxes, iou, readings
from ptq4sam.data.coco import CocoDataset
from ptq4sam.data.images import ImageRecord, ImageSet
from ptq4sam.data.objects import MOST_BOXES
from ptq4sam.prompts.record import Prompts

_log = logging.getLogger(__name__)

_FEWEST = 3
_ENOUGH = 10
"""Boxes from which on it can be said how they are to be read, and that they are of no use."""

_HARDLY_ANY = 0.25
"""Share of boxes that meet an object, and of objects that a box meets, below which boxes are of no
use: by chance some do."""


@dataclass(frozen=True)
class _Picture:
    """Boxes of a file and annotated ones of one picture, x, y, width, height in pixels [n, 4]."""

    boxes: Boxes
    categories: NDArray[np.int64]
    objects: Boxes
    object_categories: NDArray[np.int64]
    size: tuple[int, int]

    def meeting(self) -> NDArray[np.bool_]:
        """Which boxes are about which objects, [boxes, objects]."""
        return iou(self.boxes[:, None], self.objects[None]) >= SAME


class Agreement:
    """Compares boxes with annotated objects; the first ones of a file are enough.

    Args:
        dataset: annotated pictures.
        given: its pictures, each with boxes x, y, width, height [n, 4] and their categories [n].
    """

    def __init__(
        self,
        dataset: CocoDataset,
        given: Iterable[tuple[ImageRecord, Boxes, NDArray[np.int64]]],
    ) -> None:
        self._pictures: list[_Picture] = []
        self._boxes = 0
        for record, boxes, categories in given:
            if self._boxes >= MOST_BOXES:
                break
            objects = [item for item in dataset.instances(record) if not item.iscrowd]
            if len(objects) and len(boxes):
                corners = np.array([item.box for item in objects], np.float64)
                self._pictures.append(
                    _Picture(
                        boxes,
                        categories,
                        _sides(corners),
                        np.array([item.category_id for item in objects]),
                        (record.width, record.height),
                    )
                )
                self._boxes += len(boxes)

    def misplaced(self) -> str | None:
        """What is wrong with boxes of which hardly any is where an object is; None for nothing."""
        if self._boxes < _FEWEST:
            return None
        share, met, objects = _met(self._pictures)
        if share >= _HARDLY_ANY:
            return None
        told = f"of {objects} annotated objects {met} have a box: "
        sizes = [np.array([one.size] * len(one.boxes), np.float64) for one in self._pictures]
        every = np.concatenate([one.boxes for one in self._pictures])
        ends = np.cumsum([len(one.boxes) for one in self._pictures])[:-1]
        for name, reading in readings(every, np.concatenate(sizes)):
            parts = np.split(reading, ends)
            read = [
                replace(one, boxes=part) for one, part in zip(self._pictures, parts, strict=True)
            ]
            if _met(read)[0] >= SAME:
                return f"{told}they fit as {name}."
        if self._boxes < _ENOUGH:
            return None
        return f"{told}are they of these pictures in this size, under the right image_id?"

    def miscategorized(self) -> str | None:
        """What is wrong with boxes of which most have another category than their object."""
        there = [one.meeting().any(axis=1) for one in self._pictures]
        located = sum(int(met.sum()) for met in there)
        same = self._with_category(0)
        if located < _FEWEST or 2 * same >= located:
            return None
        told = f"of {located} boxes that are where an object is {same} have its category: "
        for shift, how in ((1, "less"), (-1, "more")):
            if self._with_category(shift) >= 0.8 * located:
                return f"{told}they fit if each category_id is 1 {how} than it should be"
        if located < _ENOUGH:
            return None
        return f"{told}write the data set's own category ids"

    def _with_category(self, shift: int) -> int:
        """How many boxes meet an object of their category, with so much added to it."""
        count = 0
        for one in self._pictures:
            same = (one.categories + shift)[:, None] == one.object_categories[None]
            count += int((one.meeting() & same).any(axis=1).sum())
        return count


def warn_of_miscategorized(
    what: str, dataset: ImageSet, given: Iterable[tuple[ImageRecord, Prompts]]
) -> None:
    """Warn of a detector's boxes of which most have another category than their object.

    So it is where the classes that a detector knows by number are not those of a data set.

    Args:
        what: gave the boxes.
        dataset: what they are scored on.
        given: its pictures with their boxes.
    """
    if not isinstance(dataset, CocoDataset):
        return
    sides = (
        (record, _sides(prompts.boxes.astype(np.float64)), prompts.category_ids)
        for record, prompts in given
    )
    doubt = Agreement(dataset, sides).miscategorized()
    if doubt is not None:
        _log.warning("%s: %s", what, doubt)


def _sides(corners: Boxes) -> Boxes:
    """x, y, width and height of boxes xyxy [n, 4]."""
    return np.hstack([corners[:, :2], corners[:, 2:] - corners[:, :2]])


def _met(pictures: Sequence[_Picture]) -> tuple[float, int, int]:
    """The share of boxes that meet an object, or of objects that one meets if that is more.

    Returns:
        The share, how many objects are met, and how many there are.
    """
    meeting = [one.meeting() for one in pictures]
    by_box = np.concatenate([found.any(axis=1) for found in meeting])
    by_object = np.concatenate([found.any(axis=0) for found in meeting])
    return max(by_box.mean(), by_object.mean()), int(by_object.sum()), len(by_object)
