"""Pictures whose values have more than 8 bits: scaled to 8 by what the file holds.

Cameras, microscopes and scanners write 10, 12 or 14 bits into files of 16, and some tools write 8.
No file says how many of its bits are used; the largest value does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

_DEPTHS = (8, 10, 12, 14, 16)
"""Bits that values may be of; the fewest that hold the largest value are taken."""

_FEW = 1e-3
"""Share of values that may be larger than a picture's others without being a part of it."""

_SINGLE = ("R", "G", "B", "A")
"""Bands of which some files hold one after the other."""

_STORED = {"RGBa": "RGBA", **{bands: bands for bands in ("RGB", "RGBA", "RGBX", "CMYK", *_SINGLE)}}
"""How Pillow reads bands as they are stored, in both orders of bytes."""

_COLOURS = {"LA": 1, "RGB": 3, "RGBA": 3, "RGBa": 3, "CMYK": 4}
"""Bands of a mode that are colours; one more is transparency."""

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
    return _upper_bits(values, bits), _told(values, bits)


def has_wide_colours(stored: ImageFile.ImageFile) -> bool:
    """Whether Pillow, which has no such mode, drops the lower bytes of a picture not yet loaded."""
    return stored.mode in _COLOURS and any(
        _raw_mode(tile)[:-1].endswith(";16") for tile in stored.tile
    )


def narrow_colours(upper: Image.Image, path: Path) -> tuple[Image.Image, str]:
    """Colours of 16 bits in 8, by their largest value; alpha by its own.

    Args:
        upper: RGB, RGBA or CMYK, the upper bytes, as Pillow loads the file.
        path: the file, of which the lower bytes are read too if the upper ones are not used.

    Returns:
        The picture in 8 bits, and what its values were, for people.

    Raises:
        ValueError: the lower bytes are needed and cannot be read.
    """
    colours = np.asarray(upper)[..., : _COLOURS[upper.mode]]
    bits = _bits(colours.astype(np.uint16) << 8)
    if bits == _DEPTHS[-1]:
        return upper, _told(colours.astype(np.uint16) << 8, bits)
    mode, values = _stored_values(path)
    count = _COLOURS[mode]
    bits = _bits(values[..., :count])
    narrow = _upper_bits(values, bits)
    if narrow.shape[-1] > count:
        narrow[..., count] = _upper_bits(values[..., count], _bits(values[..., count]))
    picture = Image.frombytes(mode, upper.size, narrow.tobytes())
    told = _told(values[..., :count], bits)
    return picture.convert("RGBA") if mode == "RGBa" else picture, told


def _bits(values: NDArray[Any]) -> int:
    low, high = values.min(), values.max()
    if low < 0 or high >= 2 ** _DEPTHS[-1]:
        raise ValueError(
            f"its pixels exceed 16 bits: they go from {low} to {high}; convert it to 8 bits"
        )
    return next(bits for bits in _DEPTHS if high < 2**bits)


def _told(values: NDArray[Any], bits: int) -> str:
    """What values are, and whether a few (of a broken sensor) make all others dark."""
    most = bits
    for fewer in _DEPTHS[: _DEPTHS.index(bits)][::-1]:
        if np.count_nonzero(values >= 2**fewer) > _FEW * values.size:
            break
        most = fewer
    but = f", though hardly any needs more than {most} (hot pixels?)" if most < bits else ""
    return f"{bits}-bit values{but}"


def _upper_bits(values: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    narrow: NDArray[np.uint8] = (values // 2 ** (bits - 8)).astype(np.uint8)
    return narrow


def _stored_values(path: Path) -> tuple[str, NDArray[Any]]:
    """Pillow's mode of 16-bit colours, and all their bits, [height, width, bands].

    Pillow gives the upper byte of a value. The lower ones are the upper ones in the other order of
    bytes; a grey value and its transparency are four bytes, as a pixel of RGBA is.
    """
    with Image.open(path) as stored:
        kinds = {_raw_mode(tile).partition(";")[0] for tile in stored.tile}
        if kinds == {"LA"}:
            octets = _loaded(path, lambda _raw_mode: "RGBA").astype(np.uint16)
            return "LA", octets[..., ::2] << 8 | octets[..., 1::2]
        if not kinds <= set(_STORED):
            raise ValueError("its 16-bit values use few of their bits; convert it to 8 bits")
        mode = "RGBa" if kinds == {"RGBa"} else stored.mode
    upper = _loaded(path, lambda raw_mode: _order(raw_mode, raw_mode[-1]))
    lower = _loaded(path, lambda raw_mode: _order(raw_mode, _OTHER_BYTE[raw_mode[-1]]))
    return mode, upper.astype(np.uint16) << 8 | lower


def _order(raw_mode: str, order: str) -> str:
    """A raw mode as `_STORED` reads it, in an order of bytes."""
    return f"{_STORED[raw_mode.partition(';')[0]]};16{order}"


def _loaded(path: Path, as_raw_mode: Callable[[str], str]) -> NDArray[np.uint8]:
    """A file's pixels where what names their bytes is taken for something else."""
    with Image.open(path) as stored:
        stored.tile = [_renamed(tile, as_raw_mode(_raw_mode(tile))) for tile in stored.tile]
        stored.load()
        return np.asarray(stored)


def _raw_mode(tile: Any) -> str:
    """Names bands, size and order of a stored pixel's bytes, as RGB;16B; "" where nothing does."""
    mode = tile.args[0] if isinstance(tile.args, tuple) and tile.args else tile.args
    return mode if isinstance(mode, str) else ""


def _renamed(tile: Any, raw_mode: str) -> Any:
    """A tile whose bytes are named otherwise."""
    args = (raw_mode, *tile.args[1:]) if isinstance(tile.args, tuple) else raw_mode
    return tile._replace(args=args)
