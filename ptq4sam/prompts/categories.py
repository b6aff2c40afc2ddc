"""Whose category a detector's class is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ptq4sam.errors import CheckpointError

COCO_CATEGORY_IDS = tuple(
    number for number in range(1, 91) if number not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
)
"""Ids of the 80 categories of COCO's instances, in their order."""

NO_CATEGORY = -1
"""Stands for the category of a class that the data set lacks."""

_COCO_LABELS = 91
_UNNAMED = "label_"  # How transformers names classes of which it knows the number only.


def category_ids_by_number(
    classes: int, category_ids: Sequence[int], origin: str
) -> NDArray[np.int64]:
    """The data set's category id of each class of a detector that does not name its classes.

    Args:
        classes: how many the detector has. As many as the data set has categories are these in
            their order; any other 80 are COCO's.
        category_ids: the data set's.
        origin: the detector, for messages.

    Returns:
        [classes].

    Raises:
        CheckpointError: they are neither, as 91 classes on COCO.
    """
    if classes == len(category_ids):
        return np.array(category_ids)
    if classes == len(COCO_CATEGORY_IDS):
        return np.array(COCO_CATEGORY_IDS)
    raise CheckpointError(
        f"{origin} knows {classes} classes, the data set {len(category_ids)} categories: "
        "use a detector that was trained for these categories"
    )


def category_ids_of(
    labels: Sequence[str], categories: Mapping[int, str], origin: str
) -> NDArray[np.int64]:
    """The data set's category id of each class of a detector.

    Names decide where they are alike but for case. Classes that are then left over, since the
    detector writes them another way ("aeroplane"), go by their place in COCO's order, if that
    agrees with all names: of 91 classes the place is the id, 80 are COCO's ids in rising order.

    Args:
        labels: the detector's names, in the order of its classes.
        categories: name of each category id of the data set; empty where it has none.
        origin: the detector, for messages.

    Returns:
        [classes]; `NO_CATEGORY` for a class that the data set lacks.

    Raises:
        CheckpointError: neither names nor the number of classes fit the data set.
    """
    ids = {_plain(name): id_ for id_, name in categories.items()}
    by_name = [ids.get(_plain(label), NO_CATEGORY) for label in labels]
    named = {place: id_ for place, id_ in enumerate(by_name) if id_ != NO_CATEGORY}
    unnamed = all(_plain(label).startswith(_UNNAMED) for label in labels)
    if not named and not unnamed and categories:
        raise CheckpointError(
            f"{origin} finds {_some(labels)}, the data set has {_some(categories.values())}: "
            "use a detector of these categories, or give its classes the data set's names"
        )
    by_place = _by_place(len(labels), categories)
    if by_place is not None and all(by_place[place] == id_ for place, id_ in named.items()):
        return np.array([i if not categories or i in categories else NO_CATEGORY for i in by_place])
    if not named:
        raise CheckpointError(
            f"{origin} has {len(labels)} classes, the data set {len(categories)} categories: "
            "classes without the data set's names must be COCO's 80 or 91"
        )
    return np.array(by_name)


def _by_place(classes: int, categories: Mapping[int, str]) -> list[int] | None:
    """Ids in COCO's order, or None where there is no such order of so many classes."""
    if classes == _COCO_LABELS:
        used = set(COCO_CATEGORY_IDS)
        return [place if place in used else NO_CATEGORY for place in range(classes)]
    if classes == len(COCO_CATEGORY_IDS):
        return sorted(categories) if len(categories) == classes else list(COCO_CATEGORY_IDS)
    return None


def _plain(name: str) -> str:
    return name.strip().lower()


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "")
