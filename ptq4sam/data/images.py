"""Pictures from files, always as 8-bit RGB, whatever the file holds."""

from __future__ import annotations

import contextlib
import logging
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from ptq4sam.contents import otherwise
from ptq4sam.data.wide_values import has_wide_colours, narrow_colours, narrow_grey
from ptq4sam.downloads import where_from
from ptq4sam.errors import ConfigError, DataError

_log = logging.getLogger(__name__)

_BAD_IMAGE = "damaged image"

_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)

_SCALED = "image file %s holds %s: values of more than 8 bits are scaled by the largest"

_TURNED = (
    "image file %s is turned as its EXIF orientation says, and so are others: were they annotated "
    "as they are stored, remove the orientation"
)

MOST_PIXELS = 2**28
"""Pixels of the largest picture that is read."""

_LIMIT = threading.RLock()
"""Held by the thread that has changed Pillow's limit."""

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


class Decoded(NamedTuple):
    """A picture as RGB.

    Attributes:
        pixels: uint8 [height, width, 3].
        held: what its file held if that was wider.
        perhaps_turned: its EXIF orientation was applied, and it would have the size that was asked
            for without, too.
    """

    pixels: NDArray[np.uint8]
    held: str | None
    perhaps_turned: bool


def read_image(path: Path, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """Reads a picture as RGB; see `decode`, whose arguments and errors it has.

    What a file of more than 8 bits was taken for is logged.

    Returns:
        uint8 [height, width, 3].
    """
    pixels, held, _ = decode(path, size)
    if held is not None:
        _log.info(_SCALED, path, held)
    return pixels


def decode(path: Path, size: tuple[int, int] | None = None) -> Decoded:
    """Reads a picture as RGB.

    - Grey-scale, palette and CMYK pictures are converted. Transparent ones are laid on white, as
      viewers show them. Of several frames the first is taken.
    - Values of more than 8 bits are scaled by the bits of the largest: 8, 10, 12, 14 or 16.
    - An EXIF orientation is applied, as viewers do, unless `size` is that of the stored picture
      and not that of the turned one: then the annotations were made on the stored picture.

    Args:
        path: the file.
        size: (width, height) that the picture must have; None accepts any.

    Raises:
        DataError: the file is missing, damaged or no picture, of another size, or too large.
    """
    with _readable(path), _opened(path) as stored:
        wide = has_wide_colours(stored)
        stored.load()
        orientation = stored.getexif().get(ExifTags.Base.Orientation, 1)
        eight_bits, colours = narrow_colours(stored, path) if wide else (stored, None)
        picture, grey = _to_rgb(eight_bits)
        own = picture.size
        turned = own[::-1] if orientation in _SIDEWAYS else own
        turns = orientation in _UPRIGHT and size in (None, turned)
        if turns:
            picture = picture.transpose(_UPRIGHT[orientation])
        if size is not None and picture.size != size:
            raise DataError(
                f"image file {path} has {_shape(picture.size)} pixels where its annotations say "
                f"{_shape(size)}: they belong to another picture"
            )
        return Decoded(np.array(picture), colours or grey, turns and size == own)


def read_size(path: Path) -> tuple[int, int]:
    """Width and height that `read_image` would give, from the file's header alone.

    Raises:
        DataError: the file is missing, no picture or too large.
    """
    with _readable(path), _opened(path) as stored:
        sideways = stored.getexif().get(ExifTags.Base.Orientation, 1) in _SIDEWAYS
        width, height = stored.size
        # Pillow turns TIFF pictures by itself.
        turn = sideways and stored.format != "TIFF"
        return (height, width) if turn else (width, height)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What Pillow raises of a file is one line within the `with` block."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"there is no image file {path}") from None
    except UnidentifiedImageError as error:
        convert = "convert it to PNG or JPEG"
        instead = otherwise(path, "a picture", convert) or (
            f"is damaged or of no format that Pillow knows: download it again, or {convert}"
        )
        raise DataError(f"image file {path} cannot be read: it {instead}") from error
    except _DAMAGED as error:
        raise DataError(f"image file {path} cannot be read: {reason(error)}") from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[ImageFile.ImageFile]:
    """Pillow's picture; our limit of pixels takes the place of Pillow's, a third of it.

    Raises:
        DataError: the picture is beyond the limit.
    """
    # Pillow has one limit for the whole process, and looks at it when it loads a TIFF, too.
    with _LIMIT:
        pillows, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            with Image.open(path) as stored:
                width, height = stored.size
                if width * height > MOST_PIXELS:
                    raise DataError(
                        f"image file {path} has {_shape(stored.size)} pixels, more than "
                        f"{MOST_PIXELS / 1e6:.0f} million: scale it down or cut it into pieces"
                    )
                yield stored
        finally:
            Image.MAX_IMAGE_PIXELS = pillows


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
        self._noted: set[str] = set()

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
            pixels, held, perhaps_turned = decode(record.path, (record.width, record.height))
        except DataError as error:
            raise DataError(f"image id {record.id}: {error}") from error.__cause__
        if held is not None and _SCALED not in self._noted:
            self._noted.add(_SCALED)
            _log.info(_SCALED, record.path, held)
        if perhaps_turned and self.category_names and _TURNED not in self._noted:
            self._noted.add(_TURNED)
            _log.info(_TURNED, record.path)
        return pixels

    def file_name(self, record: ImageRecord) -> str:
        """How a file of annotations names the picture: from the folder that was given."""
        return record.path.name

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
            raise DataError(f"{problems[0]}{more}; repair it, or skip what is bad")
        self.skipped[reason] += len(problems)
        _log.warning("skipped %d x %s, first: %s", len(problems), reason, problems[0])


def require_folder(images: Path) -> None:
    """Refuse a folder of pictures that is none.

    Raises:
        DataError: it is not there, or a file.
    """
    if images.is_file():
        told = otherwise(images) or ""
        if not told.startswith("is packed"):
            told = f"is a file, not an image folder: give {images.parent}"
        raise DataError(f"{images} {told}")
    if not images.is_dir():
        raise DataError(f"there is no image folder {images}: {where_from(images)}")


def check_limit(limit: int | None) -> None:
    """Refuse a limit that leaves nothing.

    Raises:
        ConfigError: the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"asked for the first {limit} pictures: use 1 or more, or no limit")


def _to_rgb(stored: Image.Image) -> tuple[Image.Image, str | None]:
    """8-bit RGB of a picture in any of Pillow's modes, and what it held if that was wider."""
    if stored.mode.startswith(("I", "F")):
        grey, held = narrow_grey(np.asarray(stored))
        return Image.fromarray(grey).convert("RGB"), held
    if stored.has_transparency_data:
        transparent = stored.convert("RGBA")
        white = Image.new("RGBA", transparent.size, "white")
        return Image.alpha_composite(white, transparent).convert("RGB"), None
    # Not copied where it need not be: the largest pictures take a gigabyte.
    return stored if stored.mode == "RGB" else stored.convert("RGB"), None


def reason(error: BaseException) -> str:
    """An error's message in one line of bearable length, or its name where it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def _shape(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
