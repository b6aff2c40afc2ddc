"""Views of pictures as a SAM takes them, augmented, with the truth about the objects in them.

A view depends on the seed and its number alone, so that a training comes out again and can resume.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torch.nn import functional as F

from ptq4sam.distillation.pictures import (
    MIN_VISIBLE_PIXELS,
    Object,
    Photographs,
    Picture,
    draw_scene,
)
from ptq4sam.distillation.settings import Sampling
from ptq4sam.errors import DataError
from ptq4sam.sam.geometry import Geometry

NEAR_POINTS = 288
WIDE_POINTS = 64

_MOST_DRAWS = 1000
"""Pictures that a view is tried of."""

Key = tuple[int, int]
"""Phase and number of a view."""


@dataclass(frozen=True)
class View:
    """A picture in the prompts' square of side s, with n objects.

    Attributes:
        pixels: uint8 [3, h, w], at most s on a side; padded at the right and bottom it is the
            square.
        boxes: [n, 4] tight ones, in pixels of the square.
        target: [n, c, c] share of each cell of a mask that the object covers.
        points: [n, NEAR_POINTS + WIDE_POINTS, 2] places in pixels of the square, the near ones in
            and around the box, the others anywhere.
        labels: [n, points] 1 where the object is there in the picture's own resolution, which has
            more of a small object than a mask.
        seen: [c, c] 1 where a cell is not padding.
    """

    pixels: Tensor
    boxes: Tensor
    target: Tensor
    points: Tensor
    labels: Tensor
    seen: Tensor


@dataclass(frozen=True)
class Batch:
    """b views with n objects in all.

    Attributes:
        pictures: b of uint8 [3, h, w].
        boxes: [n, 4].
        target: [n, c, c].
        points: [n, points, 2].
        labels: [n, points].
        owner: [n] view of each object.
        seen: [b, c, c].
    """

    pictures: list[Tensor]
    boxes: Tensor
    target: Tensor
    points: Tensor
    labels: Tensor
    owner: Tensor
    seen: Tensor

    @classmethod
    def of(cls, views: Sequence[View]) -> Batch:
        """Stack views."""
        owner = [index for index, view in enumerate(views) for _ in view.boxes]
        return cls(
            [view.pixels for view in views],
            torch.cat([view.boxes for view in views]),
            torch.cat([view.target for view in views]),
            torch.cat([view.points for view in views]),
            torch.cat([view.labels for view in views]),
            torch.tensor(owner, device="cpu"),
            torch.stack([view.seen for view in views]),
        )

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        moved = {
            field.name: getattr(self, field.name).to(device)
            for field in dataclasses.fields(self)
            if field.name != "pictures"
        }
        return Batch([picture.to(device) for picture in self.pictures], **moved)


class Views:
    """Random views, by phase and number.

    Args:
        photographs: what is shown beside scenes; None for scenes alone.
        sampling: what is drawn.
        geometry: of the prompts' square.
        cells: rows and columns of a mask.
        seed: of all choices.
    """

    def __init__(
        self,
        photographs: Photographs | None,
        sampling: Sampling,
        geometry: Geometry,
        cells: int,
        seed: int,
    ) -> None:
        self._photographs, self._sampling = photographs, sampling
        self._geometry, self._cells, self._seed = geometry, cells, seed

    def __getitem__(self, key: Key) -> View:
        """The view of a number.

        Raises:
            DataError: a picture is damaged, or none shows an object that is large enough.
        """
        rng = np.random.default_rng([self._seed, *key])
        sampling, side = self._sampling, self._geometry.prompt_side
        for _ in range(_MOST_DRAWS):
            scene = rng.random() < sampling.scenes
            drawn = self._photographs
            picture = draw_scene(rng) if scene or drawn is None else drawn.draw(rng)
            zoom = 1.0
            if rng.random() >= 0.5:
                ends = np.log([sampling.smallest, sampling.largest])
                zoom = float(np.exp(rng.uniform(*ends)))
            scale = self._scale(picture.image, zoom)
            view = view_of(picture, rng, scale, side, self._cells, sampling.objects)
            if view is not None:
                return view
        raise DataError(
            f"{_MOST_DRAWS} pictures in a row showed no object of {MIN_VISIBLE_PIXELS} pixels in "
            f"views of {side} a side: give pictures with larger objects, or raise "
            "sampling.smallest"
        )

    def _scale(self, image: Image.Image, zoom: float) -> tuple[float, float]:
        """Pixels of the square a pixel of the picture, (x, y)."""
        width, height = image.size
        side = zoom * self._geometry.prompt_side
        if self._geometry.resizing == "square":
            return side / width, side / height
        return side / max(width, height), side / max(width, height)


def view_of(
    picture: Picture,
    rng: np.random.Generator,
    scale: tuple[float, float],
    side: int,
    cells: int,
    objects: int,
) -> View | None:
    """A random view of a picture; None where no object is seen in it.

    Args:
        picture: what is looked at.
        rng: of the place, the mirroring, colours, objects and points.
        scale: pixels of the view a pixel of the picture, (x, y).
        side: of the square that the view lies in, in pixels.
        cells: rows and columns of a mask of that square.
        objects: at most.
    """
    image = picture.image
    width, height = (max(1, round(s * length)) for s, length in zip(scale, image.size, strict=True))
    # The window's corner in the resized picture; a small picture is padded.
    left = int(rng.integers(0, max(0, width - side) + 1))
    top = int(rng.integers(0, max(0, height - side) + 1))
    shown = (min(side, width), min(side, height))
    x, y = scale
    window = (
        left / x,
        top / y,
        min((left + shown[0]) / x, image.width),
        min((top + shown[1]) / y, image.height),
    )
    flip = rng.random() < 0.5
    pixels = image.resize(shown, Image.Resampling.BILINEAR, box=window)
    pixels = _jitter_colours(ImageOps.mirror(pixels) if flip else pixels, rng)
    found = []
    for index in rng.permutation(len(picture.objects)):
        if not picture.objects[index].overlaps(window):
            continue
        seen = _Seen.through(picture.objects[index], window, shown, flip)
        if seen.window_mask.sum() >= 255 * MIN_VISIBLE_PIXELS:
            found.append(seen)
        if len(found) == objects:
            break
    return _assemble(np.asarray(pixels), found, rng, side, cells) if found else None


def _assemble(
    pixels: NDArray[np.uint8], found: list[_Seen], rng: np.random.Generator, side: int, cells: int
) -> View:
    height, width = pixels.shape[:2]
    canvas = np.zeros((len(found) + 1, side, side), np.uint8)
    canvas[:-1, :height, :width] = [seen.window_mask for seen in found]
    canvas[-1, :height, :width] = 255
    shares = F.avg_pool2d(torch.from_numpy(canvas)[:, None].float() / 255, side // cells)[:, 0]
    tight = np.stack([seen.box for seen in found])
    points = _sample_points(tight, (width, height), rng)
    labels = np.stack([seen.labels(near) for seen, near in zip(found, points, strict=True)])
    return View(
        torch.from_numpy(pixels.transpose(2, 0, 1).copy()),
        torch.from_numpy(tight),
        shares[:-1],
        torch.from_numpy(points),
        torch.from_numpy(labels),
        (shares[-1] > 0).float(),
    )


@dataclass(frozen=True)
class _Seen:
    """What a window shows of an object.

    Attributes:
        window_mask: uint8 [h, w] in the window's resolution.
        cut: uint8 part of the object's mask in the picture's own resolution, mirrored if need be.
        corner: (x, y) of the window in `cut`, in its pixels.
        scale: window pixels a pixel of `cut`, (x, y).
    """

    window_mask: NDArray[np.uint8]
    cut: NDArray[np.uint8]
    corner: NDArray[np.float64]
    scale: NDArray[np.float64]

    @classmethod
    def through(
        cls,
        item: Object,
        window: tuple[float, float, float, float],
        shown: tuple[int, int],
        flip: bool,
    ) -> _Seen:
        """Look at an object through a window (xyxy in the picture) of `shown` pixels (w, h)."""
        mask = Image.fromarray(item.mask())
        small = mask.resize(shown, Image.Resampling.BOX, box=window)
        left, top = int(window[0]), int(window[1])
        right, bottom = (min(int(np.ceil(window[k + 2])), mask.size[k]) for k in (0, 1))
        cut = mask.crop((left, top, right, bottom))
        corner = (right - window[2] if flip else window[0] - left, window[1] - top)
        sides = (window[2] - window[0], window[3] - window[1])
        if flip:
            small, cut = ImageOps.mirror(small), ImageOps.mirror(cut)
        return cls(
            np.asarray(small),
            np.asarray(cut),
            np.array(corner),
            np.array([shown[0] / sides[0], shown[1] / sides[1]]),
        )

    @property
    def box(self) -> NDArray[np.float32]:
        """Tight box of what is seen, xyxy in pixels of the window."""
        rows, columns = np.flatnonzero(self.cut.any(1)), np.flatnonzero(self.cut.any(0))
        low = (np.array([columns[0], rows[0]]) - self.corner) * self.scale
        high = (np.array([columns[-1] + 1, rows[-1] + 1]) - self.corner) * self.scale
        height, width = self.window_mask.shape
        box = np.clip([*low, *high], 0, [width, height, width, height])
        tight: NDArray[np.float32] = box.astype(np.float32)
        return tight

    def labels(self, points: NDArray[np.float32]) -> NDArray[np.float32]:
        """1 where the object is, at points [n, 2] in pixels of the window."""
        x, y = np.floor(points / self.scale + self.corner).astype(int).T
        height, width = self.cut.shape
        there = self.cut[y.clip(0, height - 1), x.clip(0, width - 1)] >= 128
        labels: NDArray[np.float32] = there.astype(np.float32)
        return labels


def _sample_points(
    boxes: NDArray[np.float32], size: tuple[int, int], rng: np.random.Generator
) -> NDArray[np.float32]:
    """Random places near each box (grown by a fifth of its sides and two pixels) and anywhere."""
    margin = 0.2 * (boxes[:, 2:] - boxes[:, :2]) + 2
    low = np.maximum(boxes[:, :2] - margin, 0)[:, None]
    high = np.minimum(boxes[:, 2:] + margin, size)[:, None]
    near = low + (high - low) * rng.random((len(boxes), NEAR_POINTS, 2))
    wide = np.array(size) * rng.random((len(boxes), WIDE_POINTS, 2))
    return np.concatenate([near, wide], axis=1).astype(np.float32)


def _jitter_colours(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        if rng.random() < 0.5:
            image = enhancer(image).enhance(float(rng.uniform(0.6, 1.4)))
    return image
