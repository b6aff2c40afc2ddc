"""Training samples for vit_nano: photographs in COCO format and generated scenes, augmented.

A sample is a square window of SAM's padded input, with boxes and masks of the objects in it. It
depends only on (seed, index), so that a training run is reproducible and can resume.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps
from pycocotools import mask as rle
from pycocotools.coco import COCO
from torch import Tensor

from ptq4sam.data.scenes import generate_scene

MIN_VISIBLE_PIXELS = 12


@dataclass(frozen=True)
class Sample:
    """One window: pixels uint8 [3, s, s], boxes [n, 4], masks uint8 [n, s, s], offset (x, y)."""

    pixels: Tensor
    boxes: Tensor
    masks: Tensor
    offset: tuple[int, int]


@dataclass(frozen=True)
class _Object:
    box: tuple[float, float, float, float]
    mask: Callable[[], NDArray[np.uint8]]

    def overlaps(self, window: tuple[float, ...]) -> bool:
        return (
            self.box[0] < window[2]
            and self.box[1] < window[3]
            and self.box[2] > window[0]
            and self.box[3] > window[1]
        )


@dataclass(frozen=True)
class _Picture:
    image: Image.Image
    objects: list[_Object]


class Photographs:
    """COCO-format photographs, held in memory as RGB arrays with compressed masks."""

    def __init__(self, sources: list[tuple[Path, Path]]) -> None:
        self._items: list[tuple[NDArray[np.uint8], list[dict[str, object]]]] = []
        for images, instances in sources:
            coco = COCO(str(instances))
            for image_id in coco.getImgIds():
                known = coco.loadAnns(coco.getAnnIds(imgIds=[image_id], iscrowd=False))
                objects = [coco.annToRLE(a) for a in known if a["area"] >= MIN_VISIBLE_PIXELS]
                if objects:
                    path = images / coco.loadImgs([image_id])[0]["file_name"]
                    with Image.open(path) as picture:
                        self._items.append((np.asarray(picture.convert("RGB")), objects))

    def __len__(self) -> int:
        return len(self._items)

    def picture(self, rng: np.random.Generator) -> _Picture:
        """A random photograph."""
        pixels, objects = self._items[int(rng.integers(len(self._items)))]
        return _Picture(Image.fromarray(pixels), [_encoded(item) for item in objects])


def _encoded(item: dict[str, object]) -> _Object:
    left, top, width, height = rle.toBbox(item)
    box = (left, top, left + width, top + height)
    return _Object(box, lambda: rle.decode(item) * 255)


def scene_picture(rng: np.random.Generator) -> _Picture:
    """A generated scene."""
    scene = generate_scene(rng)
    return _Picture(
        Image.fromarray(scene.image),
        [
            _Object(tuple(item.box.tolist()), lambda mask=item.mask: mask.astype(np.uint8) * 255)
            for item in scene.instances
        ],
    )


class WindowDataset(torch.utils.data.Dataset[Sample]):
    """Random windows of `window` pixels out of SAM's padded input of `side` pixels."""

    def __init__(
        self,
        photographs: Photographs | None,
        scene_share: float,
        window: int,
        side: int,
        boxes: int,
        seed: int,
        length: int,
    ) -> None:
        self.photographs = photographs
        self.scene_share = scene_share if photographs is not None else 1.0
        self.window, self.side, self.boxes = window, side, boxes
        self.seed, self.length = seed, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        rng = np.random.default_rng([self.seed, self.window, index])
        while True:
            if rng.random() < self.scene_share or self.photographs is None:
                picture = scene_picture(rng)
            else:
                picture = self.photographs.picture(rng)
            sample = self._window(picture, rng)
            if sample is not None:
                return sample

    def _window(self, picture: _Picture, rng: np.random.Generator) -> Sample | None:
        image = picture.image
        zoom = self._zoom(rng)
        scale = zoom * self.side / max(image.size)
        width, height = (max(1, round(scale * length)) for length in image.size)
        # The window's corner in the resized picture; a small picture is padded like SAM's input.
        left = int(rng.integers(0, max(0, width - self.window) + 1))
        top = int(rng.integers(0, max(0, height - self.window) + 1))
        shown = (min(self.window, width), min(self.window, height))
        box = tuple(v / scale for v in (left, top, left + shown[0], top + shown[1]))
        box = (box[0], box[1], min(box[2], image.width), min(box[3], image.height))
        flip = rng.random() < 0.5
        pixels = image.resize(shown, Image.Resampling.BILINEAR, box=box)
        pixels = _jitter_colours(ImageOps.mirror(pixels) if flip else pixels, rng)
        masks = []
        for index in rng.permutation(len(picture.objects)):
            if not picture.objects[index].overlaps(box):
                continue
            mask = Image.fromarray(picture.objects[index].mask())
            cut = mask.resize(shown, Image.Resampling.BOX, box=box)
            array = np.asarray(ImageOps.mirror(cut) if flip else cut)
            if np.count_nonzero(array >= 128) >= MIN_VISIBLE_PIXELS:
                masks.append(array)
            if len(masks) == self.boxes:
                break
        if not masks:
            return None
        return self._assemble(np.asarray(pixels), np.stack(masks), rng)

    def _zoom(self, rng: np.random.Generator) -> float:
        """Magnification against SAM's own resize; whole inputs are mostly seen at 1."""
        if self.window == self.side and rng.random() < 0.5:
            return 1.0
        low = 0.6 if self.window == self.side else 0.4
        return float(np.exp(rng.uniform(np.log(low), np.log(2.0))))

    def _assemble(
        self, pixels: NDArray[np.uint8], masks: NDArray[np.uint8], rng: np.random.Generator
    ) -> Sample:
        height, width = pixels.shape[:2]
        canvas = np.zeros((len(masks), self.window, self.window), np.uint8)
        canvas[:, :height, :width] = masks
        boxes = np.stack([_tight_box(mask >= 128) for mask in canvas])
        boxes = _jitter_boxes(boxes, rng, (width, height))
        room = (self.side - self.window) // 8
        offset = (8 * int(rng.integers(0, room + 1)), 8 * int(rng.integers(0, room + 1)))
        padded = np.full((3, self.window, self.window), -1, np.int16)
        padded[:, :height, :width] = pixels.transpose(2, 0, 1)
        return Sample(
            torch.from_numpy(padded), torch.from_numpy(boxes), torch.from_numpy(canvas), offset
        )


def _tight_box(mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)


def _jitter_boxes(
    boxes: NDArray[np.float32], rng: np.random.Generator, size: tuple[int, int]
) -> NDArray[np.float32]:
    """Half of the boxes stay exact, half move like a detector's (5 % of the side, at most 10)."""
    sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    noise = np.clip(rng.normal(size=boxes.shape) * 0.05 * sides, -10, 10)
    noise += rng.uniform(-0.5, 0.5, boxes.shape)
    moved = boxes + noise * (rng.random((len(boxes), 1)) < 0.5)
    limit = np.array([size[0], size[1]] * 2, np.float32)
    return np.clip(moved, 0, limit).astype(np.float32)


def _jitter_colours(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        if rng.random() < 0.5:
            image = enhancer(image).enhance(float(rng.uniform(0.6, 1.4)))
    return image


def collate(samples: list[Sample]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Stack samples.

    Returns:
        pixels int16 [b, 3, s, s] (-1 is padding), boxes [n, 4], masks [n, s, s], the image index
        [n] of each box, offsets [b, 2] (x, y).
    """
    owner = [index for index, sample in enumerate(samples) for _ in sample.boxes]
    return (
        torch.stack([sample.pixels for sample in samples]),
        torch.cat([sample.boxes for sample in samples]),
        torch.cat([sample.masks for sample in samples]),
        torch.tensor(owner),
        torch.tensor([sample.offset for sample in samples]),
    )
