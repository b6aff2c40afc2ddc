"""The lists of a COCO instances file, checked, with what writers of such files do otherwise.

What is null counts as not there. Whole numbers may be written 3.0 or "3". Names may come from
LVIS's `coco_url`, and a picture's width and height from the picture.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptq4sam.data.federated import Federated, read_federated
from ptq4sam.data.file_names import named_file
from ptq4sam.errors import DataError

_log = logging.getLogger(__name__)

_WHOLE_NUMBER = re.compile(r"-?\d{1,18}", re.ASCII)
_NUMBER = re.compile(r"-?\d{1,18}(\.\d*)?([eE][-+]?\d{1,3})?", re.ASCII)
_LARGEST = 2**63
_NUMBERS = ("area", "score")
_KEYS_SHOWN = 5
_NEEDED = {int: "int", str: "str"}

_FORMATS = {
    "image": "SA-1B's file of one picture",
    "shapes": "a file of labelme",
    "_via_img_metadata": "a file of VIA",
    "caption": "COCO's captions",
    "segments_info": "COCO's panoptic file",
}
"""What a file is by a key of it, or of its first annotation."""
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
            looks = ": it looks like COCO results (boxes)" if isinstance(content, list) else ""
            raise DataError(f"{path} is not in COCO format: it is not an object{looks}")
        self.text_number: str | None = None
        self._content = content
        self._path = path

    def categories(self) -> dict[int, str]:
        """Names of the categories by id."""
        entries = self._entries("categories", "category", {"id": int, "name": str})
        for name, count in Counter(entry["name"] for entry in entries).items():
            if count > 1:
                ids = [entry["id"] for entry in entries if entry["name"] == name]
                _log.warning("%s: categories %s are all called %r", self._path, ids, name)
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
        entries = self._content.get("annotations")
        if entries is None:
            return []
        if isinstance(entries, list) and entries and all(map(_lacks_id, entries)):
            _log.info("%s: no annotation has a number as id: they are numbered", self._path)
            for number, entry in enumerate(entries, start=1):
                entry["id"] = number
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
            found = some_names(self._content)
            if key in self._content:
                found = f"one of type {type(entries).__name__}"
            raise DataError(
                f'{self._path} is not in COCO format: there is no list "{key}" in it, but '
                f"{found}{_looks_like(self._content)}"
            )
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
                    f"{self._path} is not in COCO format: {what} id {entry['id']} is there twice: "
                    "give each its own"
                )
            seen.add(entry["id"])
        return entries

    def _check_fields(
        self, entry: Mapping[str, Any], kinds: Mapping[str, type], where: str
    ) -> None:
        for name, kind in kinds.items():
            value = entry.get(name)
            if isinstance(value, kind) and value != "" and (kind is not int or is_id(value)):
                continue
            others = [key for key in entry if key != name] if value is None else []
            near = difflib.get_close_matches(name, others, n=1)
            raise DataError(
                f"{self._path} is not in COCO format: {where}.{name} is {value!r:.60}, "
                f"{_NEEDED[kind]} needed{f' (there is {near[0]!r})' if near else ''}"
                f"{_looks_like(self._content)}"
            )


def repair(entry: dict[str, Any], whole_numbers: Iterable[str] = _WHOLE_NUMBERS) -> str | None:
    """Drop what is null, and make numbers of those that are written otherwise, in place.

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
    for key in _NUMBERS:
        value = entry.get(key)
        if isinstance(value, str) and _NUMBER.fullmatch(value):
            entry[key], text = float(value), value
    box = entry.get("bbox")
    if isinstance(box, list) and str in map(type, box):
        texts = [side for side in box if isinstance(side, str)]
        if all(map(_NUMBER.fullmatch, texts)):
            entry["bbox"], text = [float(s) if isinstance(s, str) else s for s in box], texts[0]
    return text


def _lacks_id(entry: object) -> bool:
    """Whether an annotation has no number as id, as text neither; nothing refers to it."""
    if not isinstance(entry, dict):
        return False
    number = entry.get("id")
    if isinstance(number, str):
        return _WHOLE_NUMBER.fullmatch(number) is None
    return number is None


def _looks_like(content: Mapping[str, Any]) -> str:
    """Which other format a file has, for the end of a message; "" for none that is known."""
    annotations = content.get("annotations")
    first = annotations[0] if isinstance(annotations, list) and annotations else None
    for key, what in _FORMATS.items():
        if key in content or (isinstance(first, dict) and key in first and "bbox" not in first):
            return f"; it looks like {what}: give or make an instances file"
    return ""


def is_id(value: object) -> bool:
    """Whether something is a whole number that all who score take for an id."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < _LARGEST


def some_names(mapping: Mapping[str, Any]) -> str:
    """The first keys of a mapping, for messages."""
    names = [str(name) for name in mapping]
    more = ", ..." if len(names) > _KEYS_SHOWN else ""
    return (", ".join(names[:_KEYS_SHOWN]) + more) if names else "nothing in it"
