"""The lists of a COCO instances file, checked, with what writers of such files do otherwise.

What is null counts as not there. Whole numbers may be written 3.0 or "3". Names may come from
LVIS's `coco_url`, and a picture's width and height from the picture.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptq4sam.data.federated import Federated, read_federated
from ptq4sam.data.file_names import named_file
from ptq4sam.errors import DataError

_log = logging.getLogger(__name__)

_WHOLE_NUMBER = re.compile(r"-?\d{1,18}", re.ASCII)
_WHOLE_NUMBERS = ("id", "image_id", "category_id", "iscrowd", "width", "height")

TEXT_NUMBERS = '%s: numbers are written as text, as "%s"; they are read as numbers'
"""What is logged, once a file, of a path and of the first such number."""


@dataclass(frozen=True)
class ImageEntry:
    """An entry of "images"; width and height in pixels, None where the file does not say."""

    id: int
    file_name: str
    width: int | None
    height: int | None


class InstancesFile:
    """Reads the lists of an instances file.

    Args:
        content: of the file.
        path: of the file, for messages.

    Attributes:
        text_number: the first number that was written as text, None as long as there is none.

    Raises:
        DataError: it is not in COCO format; so do the methods.
    """

    def __init__(self, content: Any, path: Path) -> None:
        if not isinstance(content, dict):
            raise DataError(f"{path} is not in COCO format: it is not an object")
        self.text_number: str | None = None
        self._content = content
        self._path = path

    def categories(self) -> dict[int, str]:
        """Names of the categories by id."""
        entries = self._entries("categories", "category", {"id": int, "name": str})
        return {entry["id"]: entry["name"] for entry in entries}

    def images(self) -> list[ImageEntry]:
        """Names and sizes of the pictures."""
        needed = {"id": int, "file_name": str}
        found = []
        for entry in self._entries("images", "image", needed, {"width": int, "height": int}):
            size = entry.get("width"), entry.get("height")
            if any(side is not None and side < 1 for side in size):
                raise DataError(
                    f"{self._path}: image id {entry['id']} has no pixels by its width and height"
                )
            found.append(ImageEntry(entry["id"], entry["file_name"], *size))
        return found

    def federated(self) -> Federated | None:
        """What LVIS's files say beyond COCO's, of images and categories that were read before."""
        return read_federated(self._content, self._path)

    def annotations(self) -> list[dict[str, Any]]:
        """The annotations as written, but for null and whole numbers; a test set has none."""
        if self._content.get("annotations") is None:
            return []
        return self._entries("annotations", "annotation", {"id": int, "image_id": int})

    def _entries(
        self,
        key: str,
        what: str,
        needed: Mapping[str, type],
        possible: Mapping[str, type] | None = None,
    ) -> list[dict[str, Any]]:
        entries = self._content.get(key)
        if not isinstance(entries, list):
            raise DataError(f'{self._path} is not in COCO format: there is no list "{key}" in it')
        seen: set[int] = set()
        for number, entry in enumerate(entries):
            where = f"{key}[{number}]"
            if not isinstance(entry, dict):
                raise DataError(f"{self._path} is not in COCO format: {where} is not an object")
            text = repair(entry)
            self.text_number = self.text_number or text
            if key == "images":
                entry["file_name"] = named_file(entry)
            given = {name: kind for name, kind in (possible or {}).items() if name in entry}
            self._check_fields(entry, {**needed, **given}, where)
            if entry["id"] in seen:
                raise DataError(
                    f"{self._path} is not in COCO format: {what} id {entry['id']} is there twice"
                )
            seen.add(entry["id"])
        return entries

    def _check_fields(
        self, entry: Mapping[str, Any], kinds: Mapping[str, type], where: str
    ) -> None:
        for name, kind in kinds.items():
            value = entry.get(name)
            if not isinstance(value, kind) or isinstance(value, bool) or value == "":
                raise DataError(
                    f"{self._path} is not in COCO format: {where}.{name} is {value!r}, "
                    f"{kind.__name__} needed"
                )


def repair(entry: dict[str, Any], whole_numbers: Iterable[str] = _WHOLE_NUMBERS) -> str | None:
    """Drop what is null, and make integers of whole numbers that are written otherwise, in place.

    Returns:
        A number that was written as text, if there is one.
    """
    if None in entry.values():
        for key in [key for key, value in entry.items() if value is None]:
            del entry[key]
    text = None
    for key in whole_numbers:
        value = entry.get(key)
        if isinstance(value, float) and value.is_integer():
            entry[key] = int(value)
        elif isinstance(value, str) and _WHOLE_NUMBER.fullmatch(value):
            entry[key], text = int(value), value
    return text
