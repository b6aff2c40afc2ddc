"""Folders of pictures without annotations, and what else lies in them."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ptq4sam.data.images import ImageRecord, ImageSet, check_limit, read_size, require_folder
from ptq4sam.errors import DataError

_log = logging.getLogger(__name__)

_NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
"""Formats that Pillow knows by name, but does not read by itself."""

_SERVICE_FOLDERS = {"__MACOSX", "@eaDir", "$RECYCLE.BIN"}
"""Folders of unpackers and file servers, which hold second copies and thumbnails."""


class ImageFolder(ImageSet):
    """The pictures of a folder, by name, without annotations; ids count from 1.

    Files that are no pictures by their name are passed over, and so are hidden ones, as macOS's
    ._a.png.

    Args:
        images: the folder.
        skip_bad: skip files with a picture's name that are none.
        limit: use the first pictures only.
        recursive: search its subfolders too, but for hidden ones.

    Raises:
        DataError: the folder is missing, holds no picture, or a file cannot be read.
    """

    def __init__(
        self,
        images: str | Path,
        skip_bad: bool = False,
        limit: int | None = None,
        recursive: bool = False,
    ) -> None:
        super().__init__(skip_bad)
        check_limit(limit)
        images = Path(images)
        require_folder(images)
        self._folder = images
        content = _content(images, recursive)
        self._files = content.pictures
        problems: list[str] = []
        for number, path in enumerate(self._files, start=1):
            if len(self.images) == limit:
                break
            try:
                self.images.append(ImageRecord(number, path, *read_size(path)))
            except DataError as error:
                problems.append(f"image id {number}: {error}")
        self._skip("damaged image", problems)
        besides = content.besides()
        if not self.images:
            raise DataError(
                f"image folder {images} holds no picture"
                + (f"; there are {besides}" if besides else "")
            )
        if besides:
            _log.info("image folder %s: passed over %s", images, besides)

    def fingerprint(self) -> str:
        """Identifies the files by name and size in bytes."""
        lines = [f"{self._name(path)} {path.stat().st_size}" for path in self._files]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def file_name(self, record: ImageRecord) -> str:
        """The picture's path from the folder."""
        return self._name(record.path)

    def _name(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()


@dataclass(frozen=True)
class _Content:
    """What lies in a folder: pictures by name, names of other files, folders not searched."""

    pictures: list[Path]
    others: list[str]
    subfolders: list[str]

    def besides(self) -> str:
        """What is not used, for people; empty if everything is."""
        told = []
        if self.others:
            told.append(f"files that are not read as pictures: {_some(self.others)}")
        if self.subfolders:
            told.append(f"subfolders, which a recursive search reads: {_some(self.subfolders)}")
        return "; ".join(told)


def _content(folder: Path, recursive: bool) -> _Content:
    formats = Image.registered_extensions()
    readable = {
        suffix
        for suffix, name in formats.items()
        if name in Image.OPEN and name not in _NO_PICTURES
    }
    pictures, others, unsearched = [], [], []
    for place, subfolders, names in _walk(folder):
        for name in names:
            is_picture = not name.startswith(".") and Path(name).suffix.lower() in readable
            if is_picture:
                pictures.append(place / name)
            else:
                others.append(name)
        if not recursive:
            unsearched = subfolders
            break
    return _Content(sorted(pictures), sorted(others), sorted(unsearched))


def _walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """As os.walk, also through links, each folder once, and not into hidden ones."""
    searched: set[str] = set()
    for place, subfolders, names in os.walk(folder, onerror=_raise, followlinks=True):
        searched.add(os.path.realpath(place))
        subfolders[:] = [
            name
            for name in subfolders
            if not name.startswith(".")
            and name not in _SERVICE_FOLDERS
            and os.path.realpath(os.path.join(place, name)) not in searched
        ]
        yield Path(place), list(subfolders), names


def _raise(error: OSError) -> None:
    raise error


def _some(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
