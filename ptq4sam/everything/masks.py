"""Found masks, held as run lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ptq4sam.data.segmentation import decode_segmentation


@dataclass(frozen=True)
class FoundMasks:
    """Masks of one picture, in the order they were preferred.

    Attributes:
        segmentations: n compressed run-length encodings of the picture's size, as COCO's.
        boxes: [n, 4] xyxy of the outermost pixels, both included; zeros for an empty mask.
        predicted_ious: [n], the model's own estimate.
        stability_scores: [n] in 0-1.
        points: [n, 2] (x, y) in the picture's pixels: the prompt of each.
        crops: [n, 4] xyxy of the crop that each was found in.
    """

    segmentations: Sequence[dict[str, Any]]
    boxes: NDArray[np.int64]
    predicted_ious: NDArray[np.float32]
    stability_scores: NDArray[np.float32]
    points: NDArray[np.float64]
    crops: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.segmentations)

    @classmethod
    def none(cls) -> FoundMasks:
        """No mask."""
        corners, numbers = np.zeros((0, 4), np.int64), np.zeros(0, np.float32)
        return cls([], corners, numbers, numbers, np.zeros((0, 2)), corners)

    @classmethod
    def joined(cls, parts: Sequence[FoundMasks]) -> FoundMasks:
        """The masks of all parts, one after the other."""
        parts = [cls.none(), *parts]
        columns = [[getattr(part, field.name) for part in parts] for field in fields(cls)]
        segmentations, *arrays = columns
        every = [segmentation for part in segmentations for segmentation in part]
        return cls(every, *(np.concatenate(column) for column in arrays))

    def take(self, places: ArrayLike) -> FoundMasks:
        """The masks at some places, in their order."""
        chosen = np.asarray(places, np.int64)
        arrays = (getattr(self, field.name)[chosen] for field in fields(self)[1:])
        return FoundMasks([self.segmentations[place] for place in chosen], *arrays)

    def mask(self, place: int) -> NDArray[np.bool_]:
        """One mask, bool [height, width], drawn at each call."""
        segmentation = self.segmentations[place]
        return decode_segmentation(segmentation, *segmentation["size"])

    def areas(self) -> NDArray[np.int64]:
        """Pixels of each mask [n]."""
        from pycocotools import mask as coco_mask

        if len(self) == 0:
            return np.zeros(0, np.int64)
        return np.asarray(coco_mask.area(list(self.segmentations))).astype(np.int64)

    def to_annotations(self) -> list[dict[str, Any]]:
        """COCO annotations with segment-anything's further keys; boxes are xywh as there."""
        return [
            {
                "segmentation": segmentation,
                "area": int(area),
                "bbox": _xywh(box),
                "predicted_iou": float(predicted),
                "stability_score": float(stability),
                "point_coords": [[float(x), float(y)]],
                "crop_box": _xywh(crop),
            }
            for segmentation, area, box, predicted, stability, (x, y), crop in zip(
                self.segmentations,
                self.areas(),
                self.boxes,
                self.predicted_ious,
                self.stability_scores,
                self.points,
                self.crops,
                strict=True,
            )
        ]


def _xywh(box: NDArray[np.int64]) -> list[int]:
    left, top, right, bottom = (int(side) for side in box)
    return [left, top, right - left, bottom - top]
