"""Generated scenes: textured, overlapping objects with exact masks, from a seed.

They stand in for photographs where none may be shipped: the embedded models are trained on them
and the demonstration runs on them. `write_scenes` writes them as a COCO-format data set.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from ptq4sam.data.scene_shapes import SHAPES, Points, Shape
from ptq4sam.data.scene_textures import (
    Field,
    background,
    contrasting_colour,
    photograph,
    surface,
)
from ptq4sam.errors import DataError
from ptq4sam.files import save_picture, write_text

SCENE_CATEGORIES: tuple[str, ...] = tuple(SHAPES)
"""Category names; an instance's category is an index here, its COCO id is that index plus one."""

MINIMUM_VISIBLE_FRACTION = 0.3
MINIMUM_VISIBLE_AREA = 60

_SUPERSAMPLING = 2
_PLACEMENT_ATTEMPTS = 6


@dataclass(frozen=True)
class SceneInstance:
    """One annotated object.

    Attributes:
        mask: visible part, bool (H, W).
        category: index into `SCENE_CATEGORIES`.
        box: (x0, y0, x1, y1) in pixels, float32, tight around `mask` (right and bottom exclusive).
    """

    mask: NDArray[np.bool_]
    category: int
    box: NDArray[np.float32]


@dataclass(frozen=True)
class Scene:
    """A generated picture, uint8 RGB (H, W, 3), and its annotated objects, back to front."""

    image: NDArray[np.uint8]
    instances: list[SceneInstance]


@dataclass(frozen=True)
class _Cutout:
    """Coverage of one object in [0, 1], (h, w), with its top left corner in the picture."""

    alpha: Field
    left: int
    top: int


def _rasterise(shape: Shape, axes: Points, angle: float, centre: Points) -> _Cutout:
    """Draws a shape with half-axes `axes` (2,) px, turned by `angle`, around `centre` (2,) px."""
    cos, sin = np.cos(angle), np.sin(angle)
    matrix = np.array([[cos, sin], [-sin, cos]]) * axes[:, None]
    parts = [part @ matrix for part in shape.parts]
    low = np.floor(np.concatenate(parts).min(axis=0) + centre).astype(int) - 1
    high = np.ceil(np.concatenate(parts).max(axis=0) + centre).astype(int) + 2
    width, height = (high - low).tolist()
    canvas = Image.new("L", (width * _SUPERSAMPLING, height * _SUPERSAMPLING))
    draw = ImageDraw.Draw(canvas)
    offset = centre - low
    for polygons, value in ((parts, 255), ([hole @ matrix for hole in shape.holes], 0)):
        for polygon in polygons:
            corners = (polygon + offset) * _SUPERSAMPLING
            draw.polygon(corners.ravel().tolist(), fill=value)
    alpha = np.asarray(canvas.reduce(_SUPERSAMPLING), dtype=np.float32) / np.float32(255.0)
    return _Cutout(alpha, int(low[0]), int(low[1]))


def _clip(
    left: int, top: int, patch: NDArray[Any], canvas: NDArray[Any]
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Slices of the canvas and of a patch lying at (left, top) on it, where the two overlap."""
    height, width = patch.shape
    y0, y1 = max(top, 0), min(top + height, canvas.shape[0])
    x0, x1 = max(left, 0), min(left + width, canvas.shape[1])
    y1, x1 = max(y0, y1), max(x0, x1)
    return (slice(y0, y1), slice(x0, x1)), (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))


class _Painter:
    """Paints objects back to front and remembers which object owns every pixel."""

    def __init__(self, rng: np.random.Generator, width: int, height: int) -> None:
        self.rng = rng
        self.image = background(rng, height, width)
        self.owner = np.full((height, width), -1, dtype=np.int16)
        self.areas: list[int] = []
        self.visible = np.zeros(0, dtype=np.int64)
        self.categories: list[int] = []

    def place(self, extent: float) -> None:
        """Adds one object of about `extent` px; gives up where it would bury another one."""
        rng = self.rng
        height, width = self.owner.shape
        category = int(rng.integers(len(SCENE_CATEGORIES)))
        shape = SHAPES[SCENE_CATEGORIES[category]](rng)
        stretch = np.sqrt(shape.aspect) ** rng.uniform(-1.0, 1.0)
        axes = 0.5 * extent * np.array([stretch, 1.0 / stretch])
        angle = rng.uniform(-shape.tilt, shape.tilt)
        margin = min(0.3 * extent, 0.2 * height)
        for _ in range(_PLACEMENT_ATTEMPTS):
            centre = rng.uniform([margin, margin], [width - margin, height - margin])
            cutout = _rasterise(shape, axes, angle, centre)
            if self._fits(cutout):
                self._paint(cutout)
                self.areas.append(int((cutout.alpha >= 0.5).sum()))
                self.categories.append(category)
                return

    def _fits(self, cutout: _Cutout) -> bool:
        """Whether the object lies in the picture and buries none of those behind it."""
        here, there = _clip(cutout.left, cutout.top, cutout.alpha, self.owner)
        covered = self.owner[here][cutout.alpha[there] >= 0.5]
        if covered.size < MINIMUM_VISIBLE_AREA:
            return False
        left = self.visible - np.bincount(covered[covered >= 0], minlength=len(self.areas))
        floor = 1.3 * MINIMUM_VISIBLE_FRACTION * np.array(self.areas)
        if np.any((left < self.visible) & (left < np.maximum(floor, MINIMUM_VISIBLE_AREA))):
            return False
        self.visible = np.append(left, covered.size)
        return True

    def _paint(self, cutout: _Cutout) -> None:
        rng = self.rng
        self._cast_shadow(cutout)
        here, there = _clip(cutout.left, cutout.top, cutout.alpha, self.owner)
        alpha = cutout.alpha[there]
        under = self.image[here]
        # One object in eight is allowed to blend in with what lies behind it.
        distance = 25.0 if rng.random() < 0.12 else 60.0
        base = contrasting_colour(rng, under.mean(axis=(0, 1)), distance)
        height, width = cutout.alpha.shape
        paint = surface(rng, height, width, base, float(rng.uniform(0.0, 0.6)))[there]
        if rng.random() < 0.3:
            inner = Image.fromarray(np.round(alpha * 255).astype(np.uint8))
            core = np.asarray(inner.filter(ImageFilter.MinFilter(3)), dtype=np.float32)
            edge = alpha - core / np.float32(255.0)
            paint *= np.float32(1.0) - np.float32(rng.uniform(0.3, 0.7)) * edge[..., None]
        self.image[here] = under + (paint - under) * alpha[..., None]
        self.owner[here][alpha >= 0.5] = len(self.areas)

    def _cast_shadow(self, cutout: _Cutout) -> None:
        rng = self.rng
        if rng.random() < 0.4:
            return
        blur = float(rng.uniform(1.0, 4.0))
        pad = int(2 * blur) + 1
        soft = Image.fromarray(np.pad(np.round(cutout.alpha * 255).astype(np.uint8), pad))
        shadow = np.asarray(soft.filter(ImageFilter.BoxBlur(blur)), dtype=np.float32)
        dx, dy = rng.integers(-5, 6, 2).tolist()
        left, top = cutout.left - pad + dx, cutout.top - pad + dy
        here, there = _clip(left, top, shadow, self.owner)
        depth = np.float32(rng.uniform(0.2, 0.6) / 255.0)
        self.image[here] *= np.float32(1.0) - depth * shadow[there][..., None]

    def instances(self) -> list[SceneInstance]:
        """Objects visible enough to be annotated, back to front."""
        found = []
        for index, (area, category) in enumerate(zip(self.areas, self.categories, strict=True)):
            mask = self.owner == index
            visible = int(mask.sum())
            if visible < max(MINIMUM_VISIBLE_AREA, MINIMUM_VISIBLE_FRACTION * area):
                continue
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            box = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=np.float32)
            found.append(SceneInstance(mask, category, box))
        return found


def generate_scene(seed: int | np.random.Generator, width: int = 320, height: int = 256) -> Scene:
    """Generates one scene of 6 to 16 objects (fewer where they do not fit).

    Args:
        seed: a seed, or a generator to draw from.
        width: pixels, at least 64.
        height: pixels, at least 64.

    Returns:
        The scene. The same seed and size give the same bytes.

    Raises:
        DataError: the picture is too small to hold a scene.
    """
    if min(width, height) < 64:
        raise DataError(f"a scene needs at least 64 x 64 px, {width} x {height} was asked for")
    rng = np.random.default_rng(seed)
    painter = _Painter(rng, width, height)
    count = int(rng.integers(6, 17))
    # Sizes of the COCO classes at the default height; large objects lie behind small ones, mostly.
    small, medium, large = (18.0, 42.0), (42.0, 110.0), (110.0, 190.0)
    limits = np.array([small, medium, large])[rng.choice(3, count, p=[0.36, 0.46, 0.18])]
    extents = np.exp(rng.uniform(np.log(limits[:, 0]), np.log(limits[:, 1])))
    extents = np.minimum(extents, 0.75 * min(width, height))
    order = np.argsort(-extents * np.exp(rng.normal(0.0, 0.35, count)), kind="stable")
    for extent in extents[order]:
        painter.place(float(extent))
    return Scene(photograph(rng, painter.image), painter.instances())


def _annotation(instance: SceneInstance, identifier: int, image_id: int) -> dict[str, Any]:
    from pycocotools import mask as coco_mask

    encoded: Any = coco_mask.encode(np.asfortranarray(instance.mask.astype(np.uint8)))
    x0, y0, x1, y1 = (float(value) for value in instance.box)
    return {
        "id": identifier,
        "image_id": image_id,
        "category_id": instance.category + 1,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": int(instance.mask.sum()),
        "iscrowd": 0,
        "segmentation": {
            "size": [int(side) for side in encoded["size"]],
            "counts": encoded["counts"].decode("ascii"),
        },
    }


def write_scenes(
    directory: Path,
    count: int,
    seed: int,
    split: str = "val",
    width: int = 320,
    height: int = 256,
) -> tuple[Path, Path]:
    """Writes scenes as a COCO-format data set, deterministic byte for byte from its arguments.

    Scene i of a split depends on (seed, split, i) alone, so that a larger count extends a smaller
    one. Every file is written under a temporary name and renamed, the annotations last.

    Args:
        directory: receives `images/<split>/*.jpg` and `annotations/<split>.json`.
        count: number of scenes.
        seed: seed of the data set.
        split: name of the split; splits of one seed share no scene.
        width: pixels.
        height: pixels.

    Returns:
        The images folder and the annotations file.

    Raises:
        DataError: the count is not positive or the picture is too small.
    """
    if count < 1:
        raise DataError(f"a data set needs at least one scene, {count} were asked for")
    images = directory / "images" / split
    annotations = directory / "annotations" / f"{split}.json"
    images.mkdir(parents=True, exist_ok=True)
    annotations.parent.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for index in range(count):
        rng = np.random.default_rng([seed, zlib.crc32(split.encode()), index])
        scene = generate_scene(rng, width, height)
        path = images / f"{index + 1:06d}.jpg"
        save_picture(Image.fromarray(scene.image), path, quality=95, subsampling=0)
        records.append({"id": index + 1, "file_name": path.name, "width": width, "height": height})
        for instance in scene.instances:
            objects.append(_annotation(instance, len(objects) + 1, index + 1))
    content = {
        "info": {"description": f"generated scenes, seed {seed}, split {split}"},
        "images": records,
        "annotations": objects,
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(SCENE_CATEGORIES)],
    }
    write_text(json.dumps(content), annotations)
    return images, annotations
