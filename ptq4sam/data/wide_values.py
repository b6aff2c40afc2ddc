"""Pictures whose values have more than 8 bits: scaled to 8 by what the file holds.

Cameras, microscopes and scanners write 10, 12 or 14 bits into files of 16, and some tools write 8.
No file says how many of its bits are used; the largest value does.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

_DEPTHS = (8, 10, 12, 14, 16)
"""Bits that values may be of; the fewest that hold the largest value are taken."""

_EITHER_ORDER = tuple(f"{bands};16" for bands in ("RGB", "RGBA", "RGBX", "R", "G", "B", "A"))
"""Bands of which Pillow decodes both orders of bytes."""

_OTHER_BYTE = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}


def narrow_grey(values: NDArray[Any]) -> tuple[NDArray[np.uint8], str]:
    """Grey values of any type in 8 bits.

    Args:
        values: [height, width], whole or floating-point numbers. Floating-point numbers below 2 are
            fractions, of which those above 1 are white.

    Returns:
        uint8 [height, width], and what the values were, for people.

    Raises:
        ValueError: a value is negative, not finite, or beyond 16 bits.
    """
    if np.issubdtype(values.dtype, np.floating):
        # Also false for NaN.
        if not (values.min() >= 0 and values.max() < np.inf):
            raise ValueError(
                "its pixels are floating-point numbers below 0 or not finite; convert it to 8 bits"
            )
        if values.max() < 2:
            return np.rint(values.clip(max=1) * 255).astype(np.uint8), "fractions from 0 to 1"
    bits = _bits(values)
    return _upper_bits(values, bits), f"{bits}-bit values"


def has_wide_colours(stored: ImageFile.ImageFile) -> bool:
    """Whether Pillow, which has no such mode, drops the lower bytes of a picture not yet loaded."""
    return stored.mode in ("RGB", "RGBA") and any(
        _raw_mode(tile)[:-1].endswith(";16") for tile in stored.tile
    )


def narrow_colours(upper: Image.Image, path: Path) -> tuple[Image.Image, str]:
    """Colours of 16 bits in 8, by their largest value; alpha by its own.

    Args:
        upper: RGB or RGBA, the upper bytes, as Pillow loads the file.
        path: the file, of which the lower bytes are read too if the upper ones are not used.

    Returns:
        The picture in the mode of `upper`, and what its values were, for people.

    Raises:
        ValueError: the lower bytes are needed and cannot be read.
    """
    high = np.asarray(upper)
    if _bits(high[..., :3].astype(np.uint16) << 8) == _DEPTHS[-1]:
        return upper, f"{_DEPTHS[-1]}-bit values"
    values = high.astype(np.uint16) << 8 | _lower_bytes(path)
    bits = _bits(values[..., :3])
    narrow = _upper_bits(values, bits)
    if upper.mode == "RGBA":
        narrow[..., 3] = _upper_bits(values[..., 3], _bits(values[..., 3]))
    return Image.fromarray(narrow), f"{bits}-bit values"


def _bits(values: NDArray[Any]) -> int:
    low, high = values.min(), values.max()
    if low < 0 or high >= 2 ** _DEPTHS[-1]:
        raise ValueError(
            f"its pixels exceed 16 bits: they go from {low} to {high}; convert it to 8 bits"
        )
    return next(bits for bits in _DEPTHS if high < 2**bits)


def _upper_bits(values: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    narrow: NDArray[np.uint8] = (values // 2 ** (bits - 8)).astype(np.uint8)
    return narrow


def _lower_bytes(path: Path) -> NDArray[np.uint8]:
    """The lower bytes of 16-bit colours, which are the upper ones in the other order of bytes."""
    with Image.open(path) as stored:
        if not all(_raw_mode(tile)[:-1] in _EITHER_ORDER for tile in stored.tile):
            raise ValueError("its 16-bit values use few of their bits; convert it to 8 bits")
        stored.tile = [_in_other_order(tile) for tile in stored.tile]
        stored.load()
        return np.asarray(stored)


def _raw_mode(tile: Any) -> str:
    """Names bands, size and order of a stored pixel's bytes, as RGB;16B; "" where nothing does."""
    mode = tile.args[0] if isinstance(tile.args, tuple) and tile.args else tile.args
    return mode if isinstance(mode, str) else ""


def _in_other_order(tile: Any) -> Any:
    raw_mode = _raw_mode(tile)
    other = raw_mode[:-1] + _OTHER_BYTE[raw_mode[-1]]
    return tile._replace(args=other if isinstance(tile.args, str) else (other, *tile.args[1:]))
