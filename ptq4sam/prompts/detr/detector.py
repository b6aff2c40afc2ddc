"""Prompts of H-Deformable-DETR and of DINO with a FocalNet, prepared as in the published table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from ptq4sam import numerics
from ptq4sam.data.images import ImageRecord
from ptq4sam.prompts.categories import COCO_CATEGORY_IDS
from ptq4sam.prompts.detections import file_digest
from ptq4sam.prompts.detr.checkpoint import load_into, read_tensors, rename
from ptq4sam.prompts.detr.dino import FocalNetDino
from ptq4sam.prompts.detr.hdetr import HDetr
from ptq4sam.prompts.record import Prompts, clean
from ptq4sam.skeletons import shapes_alone

_SHORTER, _LONGER = 800, 1333
_MEAN = (123.675, 116.28, 103.53)
_DEVIATION = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Variant:
    """One of the detectors.

    Attributes:
        name: for messages.
        build: makes it.
        rules: for `rename`.
        unused: tensors of the published weights that inference has no use for.
        limit: boxes of a picture, as in the published table.
    """

    name: str
    build: Callable[[], nn.Module]
    rules: tuple[tuple[str, str], ...]
    unused: tuple[str, ...]
    limit: int


DETR_VARIANTS = {
    "hdetr": Variant(
        "H-Deformable-DETR",
        HDetr,
        # The decoder holds all heads once more.
        ((r"^transformer\.decoder\.(class|bbox)_embed\.", r"\1_embed."),),
        (),
        limit=100,
    ),
    "focalnet-dino": Variant(
        "FocalNet-DINO",
        FocalNetDino,
        # One head is held six times, and by the decoder six times more.
        ((r"^(?:transformer\.decoder\.)?(class|bbox)_embed\.\d+\.", r"\1_embed."),),
        # Embeds the noisy labels of training.
        ("label_enc.weight",),
        limit=300,
    ),
}
"""The detectors by the names that prompts give them."""


class DetrDetector:
    """Prompt source: boxes of a DETR with 91 class scores, those of COCO's category ids.

    Args:
        kind: one of `DETR_VARIANTS`.
        path: the authors' weights.
        limit: keep at most so many boxes a picture; None takes the published number.
        device: where it runs.

    Raises:
        CheckpointError: the file is missing, or, at the first picture, does not fit.
    """

    def __init__(
        self,
        kind: str,
        path: Path,
        limit: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.kind, self.path = kind, path
        self._variant = DETR_VARIANTS[kind]
        self.limit = self._variant.limit if limit is None else limit
        self._device = torch.device(device)
        self._digest = file_digest(path)

    @property
    def name(self) -> str:
        """The detector's name."""
        return self._variant.name

    def fingerprint(self) -> str:
        """Identifies file, settings and device."""
        return f"{self.kind} {self._digest} {self.limit} {numerics.fingerprint(self._device)}"

    @torch.no_grad()
    def prompts(self, record: ImageRecord, image: NDArray[np.uint8]) -> Prompts:
        """Boxes of an RGB picture [height, width, 3], best first."""
        height, width = image.shape[:2]
        scores, boxes = self._model(prepare(image).to(self._device))
        best = choose(scores[0].float().cpu(), boxes[0].float().cpu(), self.limit)
        xyxy = best[0] * best[0].new_tensor([width, height, width, height])
        return clean(record, xyxy.numpy(), best[1].numpy(), best[2].numpy())

    @cached_property
    def _model(self) -> nn.Module:
        with shapes_alone():
            model = self._variant.build()
        state = read_tensors(self.path)
        state = rename(state, self._variant.rules, self._variant.unused, str(self.path))
        load_into(model, state, str(self.path))
        return model.eval().to(self._device)


def prepare(image: NDArray[np.uint8]) -> Tensor:
    """A picture as the detectors want it.

    Args:
        image: RGB [h, w, 3].

    Returns:
        Shorter side 800, or longer side 1333 where that is smaller; ImageNet's mean and deviation
        taken out [1, 3, height, width].
    """
    height, width = image.shape[:2]
    ratio = min(_SHORTER / min(height, width), _LONGER / max(height, width))
    size = [max(1, int(side * ratio + 0.5)) for side in (height, width)]
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    # Without anti-aliasing, and rounded, as OpenCV resizes 8-bit pictures.
    pixels = functional.interpolate(pixels, size, mode="bilinear", align_corners=False).round()
    mean, deviation = (pixels.new_tensor(x).reshape(1, 3, 1, 1) for x in (_MEAN, _DEVIATION))
    return (pixels - mean) / deviation


def choose(scores: Tensor, boxes: Tensor, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best pairs of query and class, among COCO's classes.

    Args:
        scores: before the sigmoid [queries, 91].
        boxes: cx, cy, w, h in 0-1 [queries, 4].
        limit: how many at most.

    Returns:
        Boxes xyxy in 0-1 [n, 4]; scores [n], falling; category ids [n].
    """
    ids = torch.tensor(COCO_CATEGORY_IDS, device=scores.device)
    likely = scores[:, ids].sigmoid().flatten()
    # What is no number goes last, so that it drives out nothing that is one.
    order = likely.nan_to_num(-1.0).topk(min(limit, len(likely))).indices
    queries, classes = order // len(ids), order % len(ids)
    centres, halves = boxes[queries, :2], boxes[queries, 2:] / 2
    return torch.cat([centres - halves, centres + halves], 1), likely[order], ids[classes]
