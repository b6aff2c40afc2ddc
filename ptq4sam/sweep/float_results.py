"""Masks and scores of the float model as a file, for all trials to compare with."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq4sam.errors import DataError
from ptq4sam.evaluation import mask_ious
from ptq4sam.evaluation.evaluate import Evaluation, Picture
from ptq4sam.files import read_json, write_json


@dataclass(frozen=True)
class FloatResults:
    """What the float model gave.

    Attributes:
        metrics: its scores.
        masks: run-length encoded masks of each picture, in the order of its boxes.
    """

    metrics: dict[str, Any]
    masks: dict[int, list[dict[str, Any]]]

    @classmethod
    def of(cls, evaluation: Evaluation) -> FloatResults:
        """Take them from an evaluation."""
        masks: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for result in evaluation.results:
            masks[result["image_id"]].append(result["segmentation"])
        return cls(evaluation.metrics, dict(masks))

    def save(self, path: Path) -> None:
        """Write them to a JSON file."""
        content = {"metrics": self.metrics, "masks": self.masks}
        write_json(content, path, compact=True)

    @classmethod
    def load(cls, path: Path) -> FloatResults:
        """Read them.

        Raises:
            DataError: the file is missing or damaged.
        """
        content, _ = read_json(path, "file of float results")
        try:
            masks = {int(image): found for image, found in content["masks"].items()}
            return cls(content["metrics"], masks)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"float results {path} are damaged ({error}): delete them to compute them again"
            ) from error


@dataclass
class Agreement:
    """Mean IoU of a model's masks with the float model's; to be called with each picture.

    Attributes:
        reference: what the float model gave.
        ious: of all masks.
        pictures: mean and number of masks of each picture, by its id.
    """

    reference: FloatResults
    ious: list[float] = field(default_factory=list)
    pictures: dict[int, tuple[float, int]] = field(default_factory=dict)

    def __call__(self, picture: Picture) -> None:
        """Compare a picture's masks, one by one."""
        expected = _decode(self.reference.masks[picture.record.id])
        found = mask_ious(picture.segmented.masks, expected).tolist()
        self.ious.extend(found)
        if found:
            self.pictures[picture.record.id] = (float(np.mean(found)), len(found))

    @property
    def mean(self) -> float:
        """Over all masks; NaN without any."""
        return float(np.mean(self.ious)) if self.ious else float("nan")


def _decode(masks: list[dict[str, Any]]) -> NDArray[np.bool_]:
    """Bool [n, height, width]."""
    from pycocotools import mask as coco_mask

    decoded: Any = coco_mask.decode(masks)
    found: NDArray[np.bool_] = np.ascontiguousarray(decoded.transpose(2, 0, 1)).astype(np.bool_)
    return found
