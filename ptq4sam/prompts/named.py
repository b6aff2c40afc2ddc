"""Results with names of pictures and categories for their ids, or other words for the score."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ptq4sam.data.images import ImageSet

_log = logging.getLogger(__name__)

_SCORES = ("confidence", "conf", "probability", "prob")
"""What others call the score."""


class Names:
    """Puts ids in the place of names.

    A picture may be named by its file, with or without suffix, as ultralytics does; a category by
    the data set's name of it.

    Args:
        dataset: whose names they are.
    """

    def __init__(self, dataset: ImageSet) -> None:
        names = [(record.path.name, record.id) for record in dataset.images]
        stems = [(record.path.stem, record.id) for record in dataset.images]
        files = [(dataset.file_name(record), record.id) for record in dataset.images]
        self._pictures = _unique([*names, *stems, *files])
        self._categories = _unique(
            (name.strip().lower(), id_) for id_, name in dataset.category_names.items()
        )
        self._replaced: Counter[str] = Counter()
        self._first: dict[str, Any] = {}

    def replace(self, entry: dict[str, Any]) -> None:
        """Replace the names in a result, in place."""
        picture, category = entry.get("image_id"), entry.get("category_id")
        # "7" is an id that is written as text, "007" is none.
        if isinstance(picture, str) and not _is_plain_number(picture):
            self._put(entry, "image_id", self._pictures.get(picture))
        if isinstance(category, str):
            self._put(entry, "category_id", self._categories.get(category.strip().lower()))
        if entry.get("score") is None:
            name = next((name for name in _SCORES if name in entry), None)
            if name is not None:
                self._first.setdefault("score", name)
                self._replaced["score"] += 1
                entry["score"] = entry[name]

    def is_of_another(self, entry: Mapping[str, Any]) -> bool:
        """Whether a result names a picture that is not there, in a file that names pictures."""
        name = entry.get("image_id")
        return "image_id" in self._replaced and isinstance(name, str) and not _is_plain_number(name)

    def tell(self, path: Path) -> None:
        """Log what was replaced in a file."""
        for key, count in self._replaced.items():
            _log.info(
                "%s: %d results write %s as %r, which is understood",
                path,
                count,
                key,
                self._first[key],
            )

    def _put(self, entry: dict[str, Any], key: str, found: int | None) -> None:
        if found is not None:
            self._first.setdefault(key, entry[key])
            self._replaced[key] += 1
            entry[key] = found


def _unique(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Ids by name, without names that several ids have."""
    ids: dict[str, set[int]] = {}
    for name, id_ in pairs:
        ids.setdefault(name, set()).add(id_)
    return {name: next(iter(found)) for name, found in ids.items() if len(found) == 1}


def _is_plain_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and str(int(text)) == text
