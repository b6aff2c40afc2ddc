"""Where a picture is looked at: overlapping crops, and a grid of points in each."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ptq4sam.everything.settings import EverythingSettings


@dataclass(frozen=True)
class Crop:
    """A part of a picture: xyxy in its pixels, and its layer (0 is the whole picture)."""

    box: tuple[int, int, int, int]
    layer: int

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        left, top, right, bottom = self.box
        return bottom - top, right - left

    def of(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The part of a picture [height, width, 3]."""
        left, top, right, bottom = self.box
        return image[top:bottom, left:right]


def make_crops(size: tuple[int, int], settings: EverythingSettings) -> list[Crop]:
    """The whole picture, then layer l of 2^l x 2^l crops, column after column.

    All crops of a layer have one size, but for those at the right and bottom, and overlap by one
    number of pixels, which halves from layer to layer.

    Args:
        size: (height, width) of the picture.
        settings: how many layers, and the overlap.
    """
    height, width = size
    crops = [Crop((0, 0, width, height), 0)]
    for layer in range(1, settings.crop_n_layers + 1):
        count = 2**layer
        overlap = int(settings.crop_overlap_ratio * min(size) * (2 / count))
        columns, rows = (_intervals(length, count, overlap) for length in (width, height))
        crops.extend(
            Crop((left, top, right, bottom), layer)
            for left, right in columns
            for top, bottom in rows
            # Of a tiny picture the last ones may have no pixel.
            if left < right and top < bottom
        )
    return crops


def _intervals(length: int, count: int, overlap: int) -> list[tuple[int, int]]:
    """Intervals of one length that overlap by so many pixels and together cover 0 to `length`."""
    each = math.ceil((overlap * (count - 1) + length) / count)
    starts = ((each - overlap) * index for index in range(count))
    return [(start, min(start + each, length)) for start in starts]


def point_grid(per_side: int) -> NDArray[np.float64]:
    """[per_side^2, 2] (x, y) in 0-1, row after row: the centres of equal cells."""
    offset = 1 / (2 * per_side)
    steps = np.linspace(offset, 1 - offset, per_side)
    x, y = np.meshgrid(steps, steps)
    points: NDArray[np.float64] = np.stack([x, y], axis=-1).reshape(-1, 2)
    return points


def grid_of(crop: Crop, settings: EverythingSettings) -> NDArray[np.float64]:
    """The points of a crop [n, 2] (x, y), in its own pixels."""
    height, width = crop.size
    return point_grid(settings.points_in_layer(crop.layer)) * np.array([width, height], np.float64)
