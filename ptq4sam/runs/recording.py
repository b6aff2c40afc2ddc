"""Collects what `RunRecord` keeps of pictures while they are evaluated."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ptq4sam import parallel
from ptq4sam.evaluation.evaluate import Picture
from ptq4sam.evaluation.pictures import colour_of
from ptq4sam.evaluation.segmentation import Segmented
from ptq4sam.runs.record import PictureRecord, PictureScore

MOST_PICTURES = 24
"""Pictures that are kept."""
LONGEST_SIDE = 640
"""Pixels of a kept picture."""
MOST_BYTES = 6_000_000
"""Of all kept pictures together, as they are written."""

_COLOURS = 100
_FILLED, _OUTLINE = 100, 255
"""Opacity of a mask and of its outline, of 255."""
_LOST, _GAINED, _BOTH = (222, 45, 38), (49, 130, 246), (150, 150, 150)
Layer = NDArray[np.uint8]
"""Indices of a palette's colours; 0 is transparent."""


@dataclass(frozen=True)
class _Kept:
    score: PictureScore
    image: Image.Image
    quantized: Layer
    reference: Layer | None
    difference: Layer | None


class PictureRecorder:
    """Scores of every picture, and the worst pictures with their masks.

    Only a picture among the worst so far is drawn, and only what is left at the end is encoded.

    Args:
        threshold: masks with a lower score in both models are not looked at, unless all are.
        most: pictures to keep.
    """

    def __init__(self, threshold: float = 0.0, most: int = MOST_PICTURES) -> None:
        self.threshold = threshold
        self._most = most
        self._scores: list[PictureScore] = []
        self._worst: list[_Kept] = []

    def __call__(self, picture: Picture) -> None:
        """Take one evaluated picture into account."""
        shown = self._shown(picture)
        score = PictureScore(
            picture.record.id,
            picture.record.path.name,
            int(shown.sum()),
            _mean(picture.agreement, shown),
            _mean(picture.ious, shown),
            _mean(picture.float_ious, shown),
        )
        self._scores.append(score)
        rank = score.rank
        if rank is None:
            return
        if len(self._worst) == self._most and rank >= _rank(self._worst[-1].score):
            return
        self._worst.append(_keep(picture, shown, score))
        self._worst = sorted(self._worst, key=lambda kept: _rank(kept.score))[: self._most]

    def scores(self) -> tuple[PictureScore, ...]:
        """Of all pictures that all processes saw, in the order of their ids."""
        found = [score for part in parallel.gather([self._scores]) for score in part]
        return tuple(sorted(found, key=lambda score: score.id))

    def worst(self) -> tuple[PictureRecord, ...]:
        """The worst pictures that all processes saw, as many as fit."""
        mine = [_encoded(kept) for kept in self._worst]
        found = [picture for part in parallel.gather([mine]) for picture in part]
        fitting: list[PictureRecord] = []
        left = MOST_BYTES
        for picture in sorted(found, key=lambda picture: _rank(picture.score))[: self._most]:
            parts = (picture.image, picture.quantized, picture.reference, picture.difference)
            left -= sum(len(part) for part in parts if part is not None)
            if left < 0:
                break
            fitting.append(picture)
        return tuple(fitting)

    def _shown(self, picture: Picture) -> NDArray[np.bool_]:
        """Which masks are looked at."""
        scores = picture.segmented.scores
        if picture.reference is not None:
            scores = np.maximum(scores, picture.reference.scores)
        shown: NDArray[np.bool_] = scores >= self.threshold
        return shown if shown.any() else np.ones_like(shown)


def _rank(score: PictureScore) -> float:
    return 1.0 if score.rank is None else score.rank


def _mean(values: Sequence[float], shown: NDArray[np.bool_]) -> float | None:
    return float(np.asarray(values)[shown].mean()) if len(values) else None


def _keep(picture: Picture, shown: NDArray[np.bool_], score: PictureScore) -> _Kept:
    height, width = picture.image.shape[:2]
    scale = min(1.0, LONGEST_SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    image = Image.fromarray(picture.image).resize(size, Image.Resampling.LANCZOS)
    boxes = picture.prompts.boxes[shown] * scale

    def layer(segmented: Segmented) -> Layer:
        masks = _resized(segmented.masks[shown], size)
        return _coloured(masks, segmented.scores[shown], boxes)

    reference = difference = None
    if picture.reference is not None:
        reference = layer(picture.reference)
        expected = _resized(picture.reference.masks[shown], size)
        found = _resized(picture.segmented.masks[shown], size)
        difference = np.zeros(found.shape[1:], np.uint8)
        difference[(found & expected).any(axis=0)] = 3
        difference[(found & ~expected).any(axis=0)] = 2
        difference[(expected & ~found).any(axis=0)] = 1
    return _Kept(score, image, layer(picture.segmented), reference, difference)


def _resized(masks: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Masks [n, height, width] at another size (width, height), to the nearest pixel."""
    width, height = size
    rows = ((np.arange(height) + 0.5) * masks.shape[1] / height).astype(np.intp)
    columns = ((np.arange(width) + 0.5) * masks.shape[2] / width).astype(np.intp)
    return masks[:, rows[:, None], columns[None, :]]


def _coloured(
    masks: NDArray[np.bool_], scores: NDArray[np.float32], boxes: NDArray[np.float32]
) -> Layer:
    """Masks with outlines and boxes, the best on top; a mask's colour follows from its place."""
    layer = np.zeros(masks.shape[1:], np.uint8)
    order = np.argsort(scores, kind="stable")
    for i in order:
        colour = 1 + 2 * (int(i) % _COLOURS)
        layer[masks[i]] = colour
        padded = np.pad(masks[i], 1)
        inner = padded[1:-1, :-2] & padded[1:-1, 2:] & padded[:-2, 1:-1] & padded[2:, 1:-1]
        layer[masks[i] & ~inner] = colour + 1
    picture = Image.fromarray(layer)
    draw = ImageDraw.Draw(picture)
    for i in order:
        x0, y0, x1, y1 = (float(side) for side in boxes[i])
        corners = (x0, y0, max(x0, x1 - 1), max(y0, y1 - 1))
        draw.rectangle(corners, outline=2 + 2 * (int(i) % _COLOURS))
    return np.asarray(picture)


def _encoded(kept: _Kept) -> PictureRecord:
    width, height = kept.image.size
    colours = [colour_of(number) for number in range(_COLOURS)]
    palette = [(*colour, opacity) for colour in colours for opacity in (_FILLED, _OUTLINE)]
    differences = [(*_LOST, 200), (*_GAINED, 200), (*_BOTH, 110)]
    return PictureRecord(
        kept.score,
        width,
        height,
        _uri(kept.image, "webp", quality=78, method=2),
        _layer_uri(kept.quantized, palette),
        None if kept.reference is None else _layer_uri(kept.reference, palette),
        None if kept.difference is None else _layer_uri(kept.difference, differences),
    )


def _layer_uri(layer: Layer, colours: Sequence[tuple[int, int, int, int]]) -> str:
    picture = Image.fromarray(layer).convert("P")
    picture.putpalette([0, 0, 0, *(part for colour in colours for part in colour[:3])])
    opacities = bytes([0, *(colour[3] for colour in colours)])
    return _uri(picture, "png", transparency=opacities)


def _uri(picture: Image.Image, kind: str, **options: object) -> str:
    written = io.BytesIO()
    picture.save(written, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(written.getvalue()).decode()}"
