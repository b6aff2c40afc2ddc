"""The record of boxes that prompt a picture, and the interface of what gives them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ptq4sam.data.images import ImageRecord, ImageSet
from ptq4sam.errors import DataError

_log = logging.getLogger(__name__)

NOT_A_NUMBER = "box that is not a number"
"""Why a box is dropped that has a NaN or infinity, or such a score."""


@dataclass(frozen=True, eq=False)
class Prompts:
    """Boxes of one picture, best first.

    Attributes:
        image_id: the picture's id in its data set.
        boxes: xyxy in pixels of the original picture, float32 [n, 4].
        scores: float32 [n].
        category_ids: the data set's ids, int64 [n].

    Raises:
        DataError: the shapes do not belong together.
    """

    image_id: int
    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    category_ids: NDArray[np.int64]

    def __post_init__(self) -> None:
        boxes = np.asarray(self.boxes, np.float32)
        scores = np.asarray(self.scores, np.float32)
        category_ids = np.asarray(self.category_ids, np.int64)
        boxes = boxes.reshape(0, 4) if boxes.size == 0 else boxes
        count = len(boxes)
        if boxes.shape != (count, 4) or not scores.shape == category_ids.shape == (count,):
            raise DataError(
                f"image id {self.image_id}: boxes of shape {boxes.shape}, scores {scores.shape} "
                f"and categories {category_ids.shape} given, (n, 4), (n,) and (n,) needed"
            )
        object.__setattr__(self, "boxes", boxes)
        object.__setattr__(self, "scores", scores)
        object.__setattr__(self, "category_ids", category_ids)

    def __len__(self) -> int:
        """Number of boxes."""
        return len(self.boxes)

    def first(self, count: int | None) -> Prompts:
        """The best boxes, at most so many; None for all."""
        return self._select(slice(count))

    def above(self, threshold: float) -> Prompts:
        """The boxes with at least that score."""
        return self._select(self.scores >= threshold)

    def _select(self, chosen: slice | NDArray[np.bool_] | NDArray[np.intp]) -> Prompts:
        return Prompts(
            self.image_id, self.boxes[chosen], self.scores[chosen], self.category_ids[chosen]
        )


class PromptSource(Protocol):
    """Gives boxes for pictures."""

    @property
    def name(self) -> str:
        """Short name, for messages."""

    def fingerprint(self) -> str:
        """Identifies everything that the boxes depend on, apart from the picture."""

    def prompts(self, record: ImageRecord, image: NDArray[np.uint8]) -> Prompts:
        """Boxes of one picture.

        Args:
            record: the picture's entry in its data set.
            image: RGB uint8 [height, width, 3].
        """


def clean(
    record: ImageRecord,
    boxes: ArrayLike,
    scores: ArrayLike,
    category_ids: ArrayLike,
    limit: int | None = None,
    dropped: Counter[str] | None = None,
) -> Prompts:
    """Boxes that can prompt the picture, best first (equal scores stay in order).

    What any source may be given is settled here:

    - a box or score that is not a number (NaN, infinity) is dropped,
    - a box is cut off at the picture's border,
    - a box that then has no area (outside, empty or inside out) is dropped,
    - equal boxes stay: which of them are duplicates, the source knows,
    - no boxes at all are possible: such a picture costs no forward pass and counts with what it has
      that was not found.

    What is dropped is counted in a warning.

    Args:
        record: the picture.
        boxes: xyxy in pixels [n, 4].
        scores: [n].
        category_ids: [n].
        limit: keep at most so many.
        dropped: receives the counts by reason.
    """
    with np.errstate(over="ignore"):
        raw = Prompts(
            record.id,
            np.asarray(boxes, np.float32),
            np.asarray(scores, np.float32),
            np.asarray(category_ids, np.int64),
        )
    finite = np.isfinite(raw.boxes).all(axis=1) & np.isfinite(raw.scores)
    border = np.array([record.width, record.height] * 2, np.float32)
    inside = np.clip(raw.boxes, 0, border)
    with np.errstate(invalid="ignore"):
        extent = (inside[:, 2:] > inside[:, :2]).all(axis=1)
    counts = Counter(
        {
            NOT_A_NUMBER: int((~finite).sum()),
            "box without area in the picture": int((finite & ~extent).sum()),
        }
    )
    for reason, count in (+counts).items():
        _log.warning("image id %d: dropped %d x %s", record.id, count, reason)
    if dropped is not None:
        dropped.update(+counts)
    kept = np.flatnonzero(finite & extent)
    order = kept[np.argsort(-raw.scores[kept], kind="stable")][:limit]
    return Prompts(record.id, inside[order], raw.scores[order], raw.category_ids[order])


def warn_of_categories(what: str, used: Counter[int], dataset: ImageSet) -> None:
    """Count the boxes of categories that a data set with categories does not have.

    They are prompted with as all others are, but cannot score.

    Args:
        what: gave the boxes.
        used: how many boxes there are of each category.
        dataset: what they are scored on.
    """
    unknown = {id_: count for id_, count in used.items() if id_ not in dataset.category_names}
    if dataset.category_names and unknown:
        _log.warning(
            "%s: %d of %d boxes have categories that the data set lacks (ids %s): "
            "they cannot score",
            what,
            sum(unknown.values()),
            sum(used.values()),
            some_ids(unknown),
        )


def some_ids(ids: Iterable[int]) -> str:
    """The first of some ids, for messages."""
    ordered = sorted(ids)
    return ", ".join(map(str, ordered[:8])) + (", ..." if len(ordered) > 8 else "")
