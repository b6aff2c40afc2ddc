"""Training samples for small SAMs: photographs in COCO format and generated scenes, augmented.

A sample is a square window of SAM's padded input, with boxes and masks of the objects in it. It
depends only on (seed, index), so that a training run is reproducible and can resume.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from nano_teacher import DetectorFeatures
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps
from pycocotools import mask as rle
from pycocotools.coco import COCO
from torch import Tensor

from ptq4sam.data.scenes import generate_scene

MIN_VISIBLE_PIXELS = 3
NEAR_POINTS = 288
WIDE_POINTS = 64


@dataclass(frozen=True)
class Sample:
    """One window of s pixels with n objects.

    Attributes:
        pixels: int16 [3, s, s], -1 is padding.
        boxes: [n, 4] tight ones, in pixels of the window.
        masks: uint8 [n, s, s], 255 is the object.
        points: [n, NEAR_POINTS + WIDE_POINTS, 2] places in pixels of the window, the near ones in
            and around the box, the others anywhere.
        labels: [n, points] 1 where the object is there in the picture's own resolution, which has
            more of a small object than the window.
        offset: (x, y) of the window in SAM's input.
        features: float16 [channels, s / 8, s / 8] of a detector; no channels without a detector.
    """

    pixels: Tensor
    boxes: Tensor
    masks: Tensor
    points: Tensor
    labels: Tensor
    offset: tuple[int, int]
    features: Tensor


@dataclass(frozen=True)
class Batch:
    """Samples of b windows with n objects in all.

    Attributes:
        pixels: int16 [b, 3, s, s], -1 is padding.
        boxes: [n, 4].
        masks: uint8 [n, s, s].
        points: [n, points, 2].
        labels: [n, points].
        owner: [n] window of each object.
        offsets: [b, 2] of the windows in SAM's input.
        features: [b, channels, s / 8, s / 8].
    """

    pixels: Tensor
    boxes: Tensor
    masks: Tensor
    points: Tensor
    labels: Tensor
    owner: Tensor
    offsets: Tensor
    features: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return Batch(
            **{
                field.name: getattr(self, field.name).to(device, non_blocking=True)
                for field in dataclasses.fields(self)
            }
        )


@dataclass(frozen=True)
class Source:
    """Photographs of one annotation file, and how often they are shown.

    Attributes:
        images: folder.
        annotations: instances file in COCO format.
        weight: how often a photograph is shown, against 1.
        weights: the same for those whose `source` in the file is named.
    """

    images: str
    annotations: str
    weight: float = 1.0
    weights: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Object:
    """Box xyxy of an object in its picture, and what makes its mask, uint8 [h, w] of 0 or 255."""

    box: tuple[float, float, float, float]
    mask: Callable[[], NDArray[np.uint8]]

    def overlaps(self, window: tuple[float, ...]) -> bool:
        """Whether the box reaches into a window, xyxy in the picture."""
        return (
            self.box[0] < window[2]
            and self.box[1] < window[3]
            and self.box[2] > window[0]
            and self.box[3] > window[1]
        )


@dataclass(frozen=True)
class Picture:
    """A picture and the objects in it."""

    image: Image.Image
    objects: list[Object]


class Photographs:
    """COCO-format photographs, held in memory as RGB arrays with compressed masks."""

    def __init__(self, root: Path, sources: list[Source]) -> None:
        self._items: list[tuple[NDArray[np.uint8], list[dict[str, object]]]] = []
        weights = []
        for source in sources:
            coco = COCO(str(root / source.annotations))
            for record in coco.loadImgs(coco.getImgIds()):
                known = coco.loadAnns(coco.getAnnIds(imgIds=[record["id"]], iscrowd=False))
                objects = [coco.annToRLE(a) for a in known if a["area"] >= MIN_VISIBLE_PIXELS]
                if objects:
                    with Image.open(root / source.images / record["file_name"]) as picture:
                        self._items.append((np.asarray(picture.convert("RGB")), objects))
                    weights.append(source.weights.get(record.get("source", ""), source.weight))
        self._until = np.cumsum(weights)

    def __len__(self) -> int:
        return len(self._items)

    def picture(self, rng: np.random.Generator) -> Picture:
        """A random photograph, drawn by its weight."""
        place = rng.random() * self._until[-1]
        pixels, objects = self._items[int(np.searchsorted(self._until, place, side="right"))]
        return Picture(Image.fromarray(pixels), [_encoded(item) for item in objects])


def _encoded(item: dict[str, object]) -> Object:
    left, top, width, height = rle.toBbox(item)
    box = (left, top, left + width, top + height)
    return Object(box, lambda: rle.decode(item) * 255)


def scene_picture(rng: np.random.Generator) -> Picture:
    """A generated scene."""
    scene = generate_scene(rng)
    return Picture(
        Image.fromarray(scene.image),
        [
            Object(tuple(item.box.tolist()), lambda mask=item.mask: mask.astype(np.uint8) * 255)
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
        teacher: DetectorFeatures | None = None,
    ) -> None:
        self.photographs, self.teacher = photographs, teacher
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
            sample = self.window_of(picture, rng)
            if sample is not None:
                return sample

    def window_of(self, picture: Picture, rng: np.random.Generator) -> Sample | None:
        """A random window of a picture; None where no object is seen in it."""
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
        found = []
        for index in rng.permutation(len(picture.objects)):
            if not picture.objects[index].overlaps(box):
                continue
            seen = _Seen.through(picture.objects[index], box, shown, flip)
            if seen.window_mask.sum() >= 255 * MIN_VISIBLE_PIXELS:
                found.append(seen)
            if len(found) == self.boxes:
                break
        if not found:
            return None
        return self._assemble(np.asarray(pixels), found, rng)

    def _zoom(self, rng: np.random.Generator) -> float:
        """Magnification against SAM's own resize; whole inputs are mostly seen at 1."""
        if self.window == self.side and rng.random() < 0.5:
            return 1.0
        low = 0.6 if self.window == self.side else 0.4
        return float(np.exp(rng.uniform(np.log(low), np.log(2.0))))

    def _assemble(
        self, pixels: NDArray[np.uint8], found: list[_Seen], rng: np.random.Generator
    ) -> Sample:
        height, width = pixels.shape[:2]
        canvas = np.zeros((len(found), self.window, self.window), np.uint8)
        canvas[:, :height, :width] = [seen.window_mask for seen in found]
        tight = np.stack([seen.box for seen in found])
        points = _sample_points(tight, (width, height), rng)
        labels = np.stack([seen.labels(near) for seen, near in zip(found, points, strict=True)])
        room = (self.side - self.window) // 8
        offset = (8 * int(rng.integers(0, room + 1)), 8 * int(rng.integers(0, room + 1)))
        padded = np.full((3, self.window, self.window), -1, np.int16)
        padded[:, :height, :width] = pixels.transpose(2, 0, 1)
        arrays = (padded, tight, canvas, points, labels)
        features = torch.empty(0, self.window // 8, self.window // 8)
        if self.teacher is not None:
            features = self.teacher(padded)
        return Sample(*map(torch.from_numpy, arrays), offset, features)


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
        cls, item: Object, window: tuple[float, ...], shown: tuple[int, int], flip: bool
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
        return np.clip([*low, *high], 0, [width, height, width, height]).astype(np.float32)

    def labels(self, points: NDArray[np.float32]) -> NDArray[np.float32]:
        """1 where the object is, at points [n, 2] in pixels of the window."""
        x, y = np.floor(points / self.scale + self.corner).astype(int).T
        height, width = self.cut.shape
        return (self.cut[y.clip(0, height - 1), x.clip(0, width - 1)] >= 128).astype(np.float32)


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


def collate(samples: list[Sample]) -> Batch:
    """Stack samples."""
    owner = [index for index, sample in enumerate(samples) for _ in sample.boxes]
    return Batch(
        torch.stack([sample.pixels for sample in samples]),
        torch.cat([sample.boxes for sample in samples]),
        torch.cat([sample.masks for sample in samples]),
        torch.cat([sample.points for sample in samples]),
        torch.cat([sample.labels for sample in samples]),
        torch.tensor(owner),
        torch.tensor([sample.offset for sample in samples]),
        torch.stack([sample.features for sample in samples]),
    )
