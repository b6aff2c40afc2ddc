"""Prompts of the annotations themselves: boxes as a perfect detector finds them, and clicks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ptq4sam.data.coco import CocoDataset, Instance
from ptq4sam.data.images import ImageRecord, ImageSet
from ptq4sam.errors import DataError
from ptq4sam.prompts.record import Prompts, clean


class GroundTruth:
    """Prompt source: annotated boxes with score 1, in file order; crowd regions are left out.

    Args:
        dataset: annotated pictures.
        crowds: as EfficientViT-SAM is evaluated: crowd regions too, and no object of less than one
            pixel.

    Raises:
        DataError: the data set has no annotations.
    """

    name = "ground truth"

    def __init__(self, dataset: ImageSet, crowds: bool = False) -> None:
        if not isinstance(dataset, CocoDataset) or not dataset.annotated_images():
            raise DataError("prompts from ground truth need a data set with annotations")
        self._dataset = dataset
        self._crowds = crowds

    def fingerprint(self) -> str:
        """Identifies the annotations."""
        return self._dataset.fingerprint() + ("-crowds" if self._crowds else "")

    def prompts(self, record: ImageRecord, image: NDArray[np.uint8]) -> Prompts:
        """The annotated boxes of a picture; the pixels are not looked at."""
        found, objects = self._usable(record)
        categories = np.array([item.category_id for item in objects], np.int64)
        return Prompts(record.id, found.boxes, found.scores, categories)

    def truth(self, record: ImageRecord) -> NDArray[np.bool_]:
        """Annotated masks, bool [n, height, width], one for each box of `prompts`, in its order."""
        _, objects = self._usable(record)
        masks = np.zeros((len(objects), record.height, record.width), np.bool_)
        for mask, item in zip(masks, objects, strict=True):
            mask[:] = item.mask
        return masks

    def areas(self, record: ImageRecord) -> list[float]:
        """Areas of the objects as annotated, in pixels, in the order of `prompts`."""
        return [item.area for item in self._usable(record)[1]]

    def _usable(self, record: ImageRecord) -> tuple[Prompts, list[Instance]]:
        """Boxes that can prompt, and their objects."""
        every = self._dataset.instances(record)
        objects = [item for item in every if (item.area >= 1 if self._crowds else not item.iscrowd)]
        boxes = np.array([item.box for item in objects], np.float32).reshape(-1, 4)
        # Places stand for categories, so that one sees which boxes are left.
        places = np.arange(len(objects))
        found = clean(record, boxes, np.ones(len(objects)), places)
        return found, [objects[place] for place in found.category_ids]


class Clicks(GroundTruth):
    """Prompt source: annotated objects, found by clicks on them instead of by their boxes.

    Its boxes say which objects there are. Where clicks go depends on the model's masks: see
    `ptq4sam.evaluation.clicks`.

    Args:
        dataset: annotated pictures.
        count: clicks an object.

    Raises:
        DataError: the data set has no annotations.
    """

    name = "clicks"

    def __init__(self, dataset: ImageSet, count: int = 1) -> None:
        super().__init__(dataset)
        self.count = count
