"""Calibration pictures and their boxes, from a data set and a prompt source."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import overload

import numpy as np
import torch

from ptq4sam.data import CocoDataset, ImageRecord, ImageSet
from ptq4sam.errors import CalibrationError
from ptq4sam.evaluation.evaluate import select
from ptq4sam.evaluation.prompting import Prompting
from ptq4sam.model.calibration import CalibrationItem
from ptq4sam.progress import Progress, silent
from ptq4sam.prompts import Prompts, PromptSource
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam
from ptq4sam.sam.predictor import resized_picture

_log = logging.getLogger(__name__)


class CalibrationPictures(Sequence[CalibrationItem]):
    """Calibration pictures of a data set, decoded each time they are asked for.

    A calibration set of ViT-H's inputs would hold 400 MB for nothing: reading a picture again costs
    little against running it.
    """

    def __init__(
        self, sam: Sam, dataset: ImageSet, chosen: Sequence[tuple[ImageRecord, Prompts]]
    ) -> None:
        self._sam, self._dataset, self._chosen = sam, dataset, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> CalibrationItem: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[CalibrationItem]: ...
    def __getitem__(self, index: int | slice) -> CalibrationItem | Sequence[CalibrationItem]:
        """The picture at a place, or those of a slice."""
        if isinstance(index, slice):
            return CalibrationPictures(self._sam, self._dataset, self._chosen[index])
        record, prompts = self._chosen[index]
        image = self._dataset.load(record)
        geometry, size = self._sam.geometry, (image.shape[0], image.shape[1])
        resized = resized_picture(image, geometry)
        pixels = torch.from_numpy(resized).permute(2, 0, 1)[None].to(self._sam.device)
        height, width = (new / old for new, old in zip(geometry.placed(size), size, strict=True))
        boxes = torch.from_numpy(prompts.boxes).double()
        boxes = (boxes * boxes.new_tensor([width, height, width, height])).float()
        return CalibrationItem(self._sam.preprocess(pixels), boxes)


def order_seed(scheme: Scheme, seed: int) -> int | None:
    """The seed of the order of calibration pictures, None where the scheme takes the file's."""
    return seed if scheme.calibrate_order == "random" else None


def calibration_pictures(
    sam: Sam,
    dataset: ImageSet,
    source: PromptSource,
    size: int,
    prompting: Prompting,
    progress: Progress = silent,
    seed: int | None = None,
) -> CalibrationPictures:
    """The first `size` pictures for which the source has boxes.

    Of a data set with annotations the annotated pictures are used.

    Args:
        sam: gives the size of its input.
        dataset: of the pictures.
        source: of the boxes.
        size: number of pictures.
        prompting: which of the boxes.
        progress: shows how far it is.
        seed: of the order that they are taken in; None for that of the file.

    Raises:
        CalibrationError: no picture has boxes.
    """
    records = dataset.annotated_images() if isinstance(dataset, CocoDataset) else dataset.images
    if seed is not None:
        order = np.random.default_rng(seed).permutation(len(records))
        records = [records[place] for place in order]
    chosen: list[tuple[ImageRecord, Prompts]] = []
    without = 0
    for record in progress(records, "boxes of calibration pictures"):
        if len(chosen) == size:
            break
        image = dataset.load_or_skip(record)
        if image is None:
            continue
        prompts = select(source.prompts(record, image), prompting)
        if len(prompts.boxes):
            chosen.append((record, prompts))
        else:
            without += 1
    if not chosen:
        raise CalibrationError(
            f"asked for {size} calibration pictures, but {source.name} gave no box on any of "
            f"{without} pictures: use other pictures or ground-truth prompts"
        )
    if len(chosen) < size:
        _log.warning(
            "calibrating on %d pictures instead of %d: the data set has no more with boxes",
            len(chosen),
            size,
        )
    return CalibrationPictures(sam, dataset, chosen)
