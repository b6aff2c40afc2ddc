"""Average precision of masks and boxes, as COCO (Lin et al., 2014) and LVIS have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ptq4sam.data.coco import CocoDataset
from ptq4sam.data.images import ImageRecord, ImageSet
from ptq4sam.data.segmentation import encode_masks
from ptq4sam.errors import DataError
from ptq4sam.evaluation.evaluators import Evaluator, Kind, average_precision
from ptq4sam.prompts.coco_results import to_results
from ptq4sam.prompts.record import Prompts


class MaskScores:
    """Collects masks of a data set and computes their AP.

    Attributes:
        results: the masks in the COCO results format.
    """

    def __init__(self, dataset: ImageSet) -> None:
        self._dataset = dataset
        self.results: list[dict[str, Any]] = []

    def add(
        self,
        record: ImageRecord,
        masks: NDArray[np.bool_] | Sequence[dict[str, Any]],
        scores: ArrayLike,
        category_ids: ArrayLike,
    ) -> None:
        """Add the masks of one picture.

        Args:
            record: the picture.
            masks: bool [n, height, width], or n run-length encodings as `encode_masks` gives.
            scores: [n].
            category_ids: [n].

        Raises:
            ValueError: the numbers of masks, scores and categories differ, or the masks have
                another size than the picture.
        """
        self.results.extend(mask_results(record, masks, scores, category_ids))

    def summarize(self, by: Evaluator | None = None) -> dict[str, float]:
        """AP, AP50, AP75, APs, APm, APl and AR in percent, over at most 100 masks a picture.

        All pictures of the data set count, also those without masks. NaN where nothing of that
        size is annotated. On LVIS as `average_precision` says.

        Args:
            by: who computes them; None for faster-coco-eval where it is installed.

        Raises:
            DataError: the data set has no annotations, or an object has no mask.
            DependencyError: who is to compute them is not installed, or does not know LVIS.
        """
        from pycocotools import mask as coco_mask

        areas = [float(coco_mask.area(result["segmentation"])) for result in self.results]
        return _average_precision(self._dataset, self.results, areas, "segm", by)


class BoxScores:
    """Collects boxes of a data set and computes their AP."""

    def __init__(self, dataset: ImageSet) -> None:
        self._dataset = dataset
        self.results: list[dict[str, Any]] = []

    def add(self, prompts: Prompts) -> None:
        """Add the boxes of one picture."""
        self.results.extend(to_results(prompts))

    def summarize(self, by: Evaluator | None = None) -> dict[str, float]:
        """As `MaskScores.summarize`, for boxes."""
        areas = [result["bbox"][2] * result["bbox"][3] for result in self.results]
        return _average_precision(self._dataset, self.results, areas, "bbox", by)


def mask_results(
    record: ImageRecord,
    masks: NDArray[np.bool_] | Sequence[dict[str, Any]],
    scores: ArrayLike,
    category_ids: ArrayLike,
) -> list[dict[str, Any]]:
    """Masks of one picture in the COCO results format; arguments and errors as `MaskScores.add`."""
    encoded = encode_masks(masks) if isinstance(masks, np.ndarray) else masks
    results = []
    for mask, score, category in zip(
        encoded, np.asarray(scores).tolist(), np.asarray(category_ids).tolist(), strict=True
    ):
        if mask["size"] != [record.height, record.width]:
            raise ValueError(f"mask of {mask['size']} pixels for {record}")
        results.append(
            {
                "image_id": record.id,
                "category_id": int(category),
                "segmentation": mask,
                "score": float(score),
            }
        )
    return results


def _average_precision(
    dataset: ImageSet,
    results: Sequence[dict[str, Any]],
    areas: Sequence[float],
    kind: Kind,
    by: Evaluator | None,
) -> dict[str, float]:
    if not isinstance(dataset, CocoDataset) or not dataset.annotated_images():
        raise DataError("scores need a data set with annotations")
    if kind == "segm":
        dataset.require_masks()
    # What COCO.loadRes does, which however fails where nothing was found.
    found = [
        {**result, "iscrowd": 0, "area": area} for result, area in zip(results, areas, strict=True)
    ]
    return average_precision(dataset, found, kind, by)
