"""Windows of SAM's padded input, for the training of vit_nano: views with a place and features."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from nano_teacher import DetectorFeatures
from torch import Tensor

from ptq4sam.distillation.pictures import Photographs, draw_scene
from ptq4sam.distillation.views import Batch, View, view_of

STRIDE = 2
"""Pixels a cell of a mask."""


@dataclass(frozen=True)
class Sample:
    """One window of s pixels with n objects.

    Attributes:
        view: of the window.
        pixels: int16 [3, s, s], -1 is padding.
        offset: (x, y) of the window in SAM's input.
        features: float16 [channels, s / 8, s / 8] of a detector; no channels without a detector.
    """

    view: View
    pixels: Tensor
    offset: tuple[int, int]
    features: Tensor


@dataclass(frozen=True)
class Windows:
    """Samples of b windows with n objects in all.

    Attributes:
        views: of the windows.
        pixels: int16 [b, 3, s, s], -1 is padding.
        offsets: [b, 2] of the windows in SAM's input.
        features: [b, channels, s / 8, s / 8].
    """

    views: Batch
    pixels: Tensor
    offsets: Tensor
    features: Tensor

    def to(self, device: torch.device) -> Windows:
        """The same on a device."""
        moved = [getattr(self, field.name).to(device) for field in dataclasses.fields(self)]
        return Windows(*moved)


class WindowDataset(torch.utils.data.Dataset[Sample]):
    """Random windows of `window` pixels out of SAM's padded input of `side` pixels.

    A sample depends on (seed, index) alone, so that a training comes out again and can resume.
    """

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
        self.scene_share, self.window, self.side = scene_share, window, side
        self.boxes, self.seed, self.length = boxes, seed, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        rng = np.random.default_rng([self.seed, self.window, index])
        while True:
            scene = rng.random() < self.scene_share or self.photographs is None
            picture = draw_scene(rng) if scene else self.photographs.draw(rng)
            scale = self._zoom(rng) * self.side / max(picture.image.size)
            cells = self.window // STRIDE
            view = view_of(picture, rng, (scale, scale), self.window, cells, self.boxes)
            if view is not None:
                return self._placed(view, rng)

    def _zoom(self, rng: np.random.Generator) -> float:
        """Magnification against SAM's own resize; whole inputs are mostly seen at 1."""
        if self.window == self.side and rng.random() < 0.5:
            return 1.0
        low = 0.6 if self.window == self.side else 0.4
        return float(np.exp(rng.uniform(np.log(low), np.log(2.0))))

    def _placed(self, view: View, rng: np.random.Generator) -> Sample:
        """A view at a random place of SAM's input."""
        room = (self.side - self.window) // 8
        offset = (8 * int(rng.integers(0, room + 1)), 8 * int(rng.integers(0, room + 1)))
        padded = torch.full((3, self.window, self.window), -1, dtype=torch.int16)
        padded[:, : view.pixels.shape[1], : view.pixels.shape[2]] = view.pixels
        features = torch.empty(0, self.window // 8, self.window // 8)
        if self.teacher is not None:
            features = self.teacher(padded.numpy())
        return Sample(view, padded, offset, features)


def collate(samples: list[Sample]) -> Windows:
    """Stack samples."""
    return Windows(
        Batch.of([sample.view for sample in samples]),
        torch.stack([sample.pixels for sample in samples]),
        torch.tensor([sample.offset for sample in samples]),
        torch.stack([sample.features for sample in samples]),
    )
