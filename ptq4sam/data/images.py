"""Pictures from files, always as 8-bit RGB, whatever the file holds."""

from __future__ import annotations

import hashlib
import logging
import struct
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from ptq4sam.downloads import where_from
from ptq4sam.errors import ConfigError, DataError

_log = logging.getLogger(__name__)

_BAD_IMAGE = "damaged image"

_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)
_BOMB = (Image.DecompressionBombError,)

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)


@dataclass(frozen=True)
class ImageRecord:
    """One picture of a data set; width and height in pixels, as `load` returns it."""

    id: int
    path: Path
    width: int
    height: int


def read_image(path: Path, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """Reads a picture as RGB.

    - Grey-scale, palette and CMYK pictures are converted. Transparent ones are laid on white, as
      viewers show them. Of 16-bit pictures the upper 8 bits are kept. Of several frames the first.
    - An EXIF orientation is applied, as viewers do, unless `size` is that of the stored picture
      and not that of the turned one: then the annotations were made on the stored picture.

    Args:
        path: the file.
        size: (width, height) that the picture must have; None accepts any.

    Returns:
        uint8 [height, width, 3].

    Raises:
        DataError: the file is missing, damaged or no picture, or of another size.
    """
    try:
        with Image.open(path) as stored:
            stored.load()
            orientation = stored.getexif().get(ExifTags.Base.Orientation, 1)
            picture = _to_rgb(stored)
    except FileNotFoundError:
        raise DataError(f"there is no image file {path}") from None
    except (*_DAMAGED, *_BOMB) as error:
        raise DataError(f"image file {path} cannot be read: {reason(error)}") from error
    turned = picture.size[::-1] if orientation in _SIDEWAYS else picture.size
    if orientation in _UPRIGHT and size in (None, turned):
        picture = picture.transpose(_UPRIGHT[orientation])
    if size is not None and picture.size != size:
        raise DataError(
            f"image file {path} has {_shape(picture.size)} pixels where its annotations say "
            f"{_shape(size)}: they belong to another picture"
        )
    return np.array(picture)


def read_size(path: Path) -> tuple[int, int]:
    """Width and height that `read_image` would give, from the file's header alone.

    Raises:
        DataError: the file is missing or no picture.
    """
    try:
        with Image.open(path) as stored:
            sideways = stored.getexif().get(ExifTags.Base.Orientation, 1) in _SIDEWAYS
            width, height = stored.size
            # Pillow turns TIFF pictures by itself.
            turn = sideways and stored.format != "TIFF"
            return (height, width) if turn else (width, height)
    except FileNotFoundError:
        raise DataError(f"there is no image file {path}") from None
    except (*_DAMAGED, *_BOMB) as error:
        raise DataError(f"image file {path} cannot be read: {reason(error)}") from error


class ImageSet:
    """Base of the data sets: pictures in a fixed order, and what was wrong with some of them.

    Attributes:
        images: the usable pictures, in file order.
        category_names: name of each category id; empty without annotations.
        skip_bad: skip what is damaged instead of raising.
        skipped: how many were skipped for which reason.
    """

    def __init__(self, skip_bad: bool) -> None:
        self.images: list[ImageRecord] = []
        self.category_names: Mapping[int, str] = {}
        self.skip_bad = skip_bad
        self.skipped: Counter[str] = Counter()

    @property
    def category_ids(self) -> list[int]:
        """Ids of the categories, ascending."""
        return sorted(self.category_names)

    def fingerprint(self) -> str:
        """Identifies the content, for caches; the same for any limit."""
        raise NotImplementedError

    def load(self, record: ImageRecord) -> NDArray[np.uint8]:
        """The picture as RGB, uint8 [height, width, 3].

        Raises:
            DataError: it cannot be read, or has another size than its record.
        """
        try:
            return read_image(record.path, (record.width, record.height))
        except DataError as error:
            raise DataError(f"image id {record.id}: {error}") from error.__cause__

    def load_or_skip(self, record: ImageRecord) -> NDArray[np.uint8] | None:
        """The picture, or None where it is damaged and damaged ones are skipped.

        A skipped picture is counted, and leaves `images`: neither its prompts nor its annotations
        count in an evaluation.

        Raises:
            DataError: it cannot be read and is not to be skipped.
        """
        try:
            return self.load(record)
        except DataError as error:
            self._skip(_BAD_IMAGE, [str(error)])
            self._remove(record)
            return None

    def leave_out(self, record: ImageRecord) -> None:
        """Skip a picture that another process found damaged."""
        if record in self.images:
            self.skipped[_BAD_IMAGE] += 1
            self._remove(record)

    def _remove(self, record: ImageRecord) -> None:
        # A new list: somebody may be walking along the old one.
        self.images = [other for other in self.images if other.id != record.id]

    def _skip(self, reason: str, problems: Sequence[str]) -> None:
        """Raise the first problem, or count all and warn once."""
        if not problems:
            return
        if not self.skip_bad:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise DataError(f"{problems[0]}{more}; repair it, or leave it out with --skip-bad")
        self.skipped[reason] += len(problems)
        _log.warning("skipped %d x %s, first: %s", len(problems), reason, problems[0])


class ImageFolder(ImageSet):
    """The pictures of a folder, by name, without annotations; ids count from 1.

    Args:
        images: the folder; its subfolders are not searched.
        skip_bad: skip files with a picture's name that are none.
        limit: use the first pictures only.

    Raises:
        DataError: the folder is missing, holds no picture, or a file cannot be read.
    """

    def __init__(self, images: Path, skip_bad: bool = False, limit: int | None = None) -> None:
        super().__init__(skip_bad)
        check_limit(limit)
        if not images.is_dir():
            raise DataError(f"there is no image folder {images}: {where_from(images)}")
        known = Image.registered_extensions()
        files = sorted(path for path in images.iterdir() if path.suffix.lower() in known)
        self._files = files
        problems: list[str] = []
        for number, path in enumerate(files, start=1):
            if len(self.images) == limit:
                break
            try:
                self.images.append(ImageRecord(number, path, *read_size(path)))
            except DataError as error:
                problems.append(f"image id {number}: {error}")
        self._skip("damaged image", problems)
        if not self.images:
            raise DataError(f"image folder {images} holds no picture")

    def fingerprint(self) -> str:
        """Identifies the files by name and size in bytes."""
        lines = [f"{path.name} {path.stat().st_size}" for path in self._files]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def check_limit(limit: int | None) -> None:
    """Refuse a limit that leaves nothing.

    Raises:
        ConfigError: the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"asked for the first {limit} pictures: use 1 or more, or no limit")


def _to_rgb(picture: Image.Image) -> Image.Image:
    """8-bit RGB of a picture in any of Pillow's modes."""
    if picture.mode.startswith("I"):
        return Image.fromarray(_upper_byte(np.asarray(picture))).convert("RGB")
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers; convert them to 8 bits")
    if picture.has_transparency_data:
        transparent = picture.convert("RGBA")
        white = Image.new("RGBA", transparent.size, "white")
        return Image.alpha_composite(white, transparent).convert("RGB")
    return picture.convert("RGB")


def _upper_byte(pixels: NDArray[np.generic]) -> NDArray[np.uint8]:
    wide = pixels.astype(np.int64)
    if wide.size and (wide.min() < 0 or wide.max() > 65535):
        raise ValueError("its pixels exceed 16 bits; convert them to 8 bits")
    return (wide >> 8).astype(np.uint8)


def reason(error: BaseException) -> str:
    """An error's message in one line of bearable length, or its name where it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def _shape(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
