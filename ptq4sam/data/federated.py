"""LVIS's federated annotations: which categories were looked for in which picture.

Of 1203 categories a picture has been searched for some (Gupta et al., "LVIS", CVPR 2019, section
3.1): those that are annotated, those that are certainly not there, and among the former some of
which not every object is annotated. What is found of another category is neither right nor wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptq4sam.data.segmentation import are_numbers
from ptq4sam.errors import DataError

FREQUENCIES = ("r", "c", "f")
"""Categories in fewer than 10 pictures of the training set, in fewer than 100, in more."""

_OF_IMAGES = ("neg_category_ids", "not_exhaustive_category_ids")
_OF_CATEGORIES = ("frequency", "synset")
_ADVICE = "give LVIS v1's own file, or one that keeps its fields"


@dataclass(frozen=True)
class Federated:
    """What an LVIS file says beyond COCO's.

    Attributes:
        absent: categories that are certainly not in a picture, by its id.
        not_exhaustive: categories of which not every object of a picture is annotated, by its id.
        frequencies: of each category, one of FREQUENCIES, by its id.
    """

    absent: Mapping[int, frozenset[int]]
    not_exhaustive: Mapping[int, frozenset[int]]
    frequencies: Mapping[int, str]

    def of_image(self, image_id: int) -> dict[str, list[int]]:
        """A picture's fields, as LVIS writes them."""
        known = self.absent[image_id], self.not_exhaustive[image_id]
        return {field: sorted(ids) for field, ids in zip(_OF_IMAGES, known, strict=True)}


def read_federated(content: Mapping[str, Any], path: Path) -> Federated | None:
    """The federated fields of an instances file; None of a file that is not LVIS's.

    Args:
        content: of the file, whose lists have been checked.
        path: of the file, for messages.

    Raises:
        DataError: some fields of LVIS are there, but not all that scores need.
    """
    images, categories = content["images"], content["categories"]
    if not any(_has(entries, fields) for entries, fields in _fields(images, categories)):
        return None
    absent, partly = (
        {image["id"]: _ids(image, field, path) for image in images} for field in _OF_IMAGES
    )
    for category in categories:
        if category.get("frequency") not in FREQUENCIES:
            raise DataError(
                f"{path} is an LVIS file, but category id {category['id']} has frequency "
                f"{category.get('frequency')!r}, not r, c or f, which APr, APc and APf need: "
                f"{_ADVICE}"
            )
    frequencies = {category["id"]: category["frequency"] for category in categories}
    return Federated(absent, partly, frequencies)


def _fields(images: Any, categories: Any) -> Iterable[tuple[Any, tuple[str, ...]]]:
    return (images, _OF_IMAGES), (categories, _OF_CATEGORIES)


def _has(entries: Iterable[Mapping[str, Any]], fields: Iterable[str]) -> bool:
    return any(field in entry for entry in entries for field in fields)


def _ids(image: Mapping[str, Any], field: str, path: Path) -> frozenset[int]:
    found = image.get(field)
    if not isinstance(found, list) or not are_numbers(found):
        raise DataError(
            f"{path} is an LVIS file, but image id {image['id']} has no list {field}, without "
            f"which right and wrong masks cannot be told apart: {_ADVICE}"
        )
    return frozenset(map(int, found))
