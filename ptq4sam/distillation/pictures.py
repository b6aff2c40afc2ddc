"""What a student is shown: photographs of COCO-format data sets, and generated scenes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ptq4sam.data import CocoDataset, ImageRecord, Instance
from ptq4sam.data.annotations import repair
from ptq4sam.data.scenes import generate_scene
from ptq4sam.distillation.settings import Source
from ptq4sam.errors import DataError
from ptq4sam.files import read_json
from ptq4sam.records import nearest_of

MIN_VISIBLE_PIXELS = 3
"""Area from which on an object is asked for."""


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
    """Annotated photographs of several data sets, read from disk when they are drawn.

    Args:
        sources: what there is, with paths as they are.
        skip_bad: skip damaged pictures and unusable annotations.

    Raises:
        DataError: pictures or annotations cannot be used, or no picture has an object.
    """

    def __init__(self, sources: Sequence[Source], skip_bad: bool = False) -> None:
        self._items: list[tuple[CocoDataset, ImageRecord]] = []
        self.fingerprints: list[str] = []
        weights: list[float] = []
        for source in sources:
            dataset = CocoDataset(source.images, source.annotations, skip_bad)
            of_image = _source_names(source) if source.weights else {}
            self.fingerprints.append(dataset.fingerprint())
            for record in dataset.images:
                if any(_is_asked_for(instance) for instance in dataset.instances(record)):
                    self._items.append((dataset, record))
                    name = of_image.get(record.id, "")
                    weights.append(source.weights.get(name, source.weight))
        self._weights, self._until = weights, np.cumsum(weights)
        self._damaged: set[int] = set()
        if not self._items or self._until[-1] <= 0:
            named = ", ".join(str(source.annotations) for source in sources)
            raise DataError(f"{named}: no picture with an object is ever shown: give others")

    def __len__(self) -> int:
        return len(self._items)

    def draw(self, rng: np.random.Generator) -> Picture:
        """A random photograph, drawn by its weight.

        Raises:
            DataError: it is damaged and not to be skipped, or all are.
        """
        while True:
            place = rng.random() * self._until[-1]
            index = int(np.searchsorted(self._until, place, side="right"))
            dataset, record = self._items[index]
            pixels = None if index in self._damaged else dataset.load_or_skip(record)
            if pixels is not None:
                return Picture(
                    Image.fromarray(pixels),
                    [_object(i) for i in dataset.instances(record) if _is_asked_for(i)],
                )
            self._damaged.add(index)
            if all(n in self._damaged for n, weight in enumerate(self._weights) if weight > 0):
                raise DataError(
                    f"all {len(self._damaged)} photographs that are shown are damaged: give others"
                )


def draw_scene(rng: np.random.Generator) -> Picture:
    """A generated scene."""
    scene = generate_scene(rng)
    return Picture(
        Image.fromarray(scene.image),
        [Object(_corners(i.box), functools.partial(_levels, i.mask)) for i in scene.instances],
    )


def _is_asked_for(instance: Instance) -> bool:
    return not instance.iscrowd and instance.area >= MIN_VISIBLE_PIXELS


def _object(instance: Instance) -> Object:
    return Object(_corners(instance.box), lambda: _levels(instance.mask))


def _levels(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    return mask.astype(np.uint8) * 255


def _corners(box: NDArray[np.float32]) -> tuple[float, float, float, float]:
    left, top, right, bottom = map(float, box)
    return left, top, right, bottom


def _source_names(source: Source) -> dict[int, str]:
    """The `source` of each picture, by its id.

    Raises:
        DataError: a weight is of a source that no picture has.
    """
    content, _ = read_json(source.annotations, "annotations file")
    for image in content["images"]:
        repair(image)
    names = {image["id"]: image.get("source", "") for image in content["images"]}
    known = sorted(set(map(str, names.values())))
    for name in source.weights:
        if name not in known:
            raise DataError(
                f"weights of {source.annotations}: {name}: no picture has that source; "
                f"{nearest_of(name, known)}"
            )
    return names
