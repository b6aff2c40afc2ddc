"""Masks of everything in each picture of a folder, as one COCO-format file and as pictures."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq4sam import parallel
from ptq4sam.data import ImageFolder, ImageRecord, ImageSet
from ptq4sam.data.images import check_limit, read_size
from ptq4sam.evaluation import write_json
from ptq4sam.evaluation.pictures import draw_segments, write_picture
from ptq4sam.everything import EverythingSettings, FoundMasks, MaskGenerator, Tally
from ptq4sam.numerics import reproducible
from ptq4sam.progress import Progress, silent
from ptq4sam.runs.pictures import file_names
from ptq4sam.runs.work_dir import claimed
from ptq4sam.sam.model import PromptableModel
from ptq4sam.sam.predictor import Predictor

_log = logging.getLogger(__name__)

RECORDS = "masks.json"
PICTURES = "pictures"
"""What is written into the output folder."""


@dataclass(frozen=True)
class Summary:
    """What was found: pictures, masks, median seconds a picture, and what filters dropped."""

    pictures: int
    masks: int
    seconds: float
    tally: Tally


@reproducible()
def segment_everything(
    sam: PromptableModel,
    dataset: ImageSet,
    folder: Path,
    settings: EverythingSettings,
    *,
    memory_budget: int | None = None,
    progress: Progress = silent,
) -> Summary:
    """Write masks of everything in each picture.

    `masks.json` is a COCO instances file of one category, with segment-anything's further keys for
    each mask; `pictures/` has the masks drawn. Several processes (see `parallel`) share the
    pictures, and the first one writes the file.

    Args:
        sam: the model, float, quantized or deployed.
        dataset: the pictures.
        folder: made where it is missing.
        settings: how masks are found.
        memory_budget: bytes of temporary memory for the decoder.
        progress: shows how far it is.

    Raises:
        DataError: a picture is damaged and not to be skipped.
        StoreError: another run writes into the folder.
    """
    with claimed(folder):
        return _segment(sam, dataset, folder, settings, memory_budget, progress)


def _segment(
    sam: PromptableModel,
    dataset: ImageSet,
    folder: Path,
    settings: EverythingSettings,
    memory_budget: int | None,
    progress: Progress,
) -> Summary:
    predictor = Predictor(sam, memory_budget)
    generator = MaskGenerator(predictor, settings)
    names, images = file_names(dataset), dataset.images
    found: list[tuple[list[dict[str, Any]], float] | None] = []
    for record in progress(parallel.share(images), "segmenting everything"):
        image = dataset.load_or_skip(record)
        if image is None:
            found.append(None)
            continue
        started = time.perf_counter()
        masks = generator.generate(image)
        seconds = time.perf_counter() - started
        _log.info("%s: %d masks, %.2f s", record.path.name, len(masks), seconds)
        found.append((masks.to_annotations(), seconds))
        write_picture(_drawn(image, masks), folder / PICTURES / f"{names[record.id]}.jpg")
    every = parallel.gather(found)
    kept = [(record, one) for record, one in zip(images, every, strict=True) if one is not None]
    annotations = [(record, masks) for record, (masks, _) in kept]
    if parallel.is_first():
        write_json(_instances(dataset, annotations, settings), folder / RECORDS, compact=True)
    seconds = float(np.median([seconds for _, (_, seconds) in kept])) if kept else 0.0
    tally = Tally.joined(parallel.gather([generator.tally]))
    return Summary(len(kept), sum(len(masks) for _, masks in annotations), seconds, tally)


def open_pictures(
    path: Path, *, skip_bad: bool, limit: int | None, recursive: bool = False
) -> ImageSet:
    """The pictures of a folder, or of its subfolders too, or one picture.

    Raises:
        DataError: there is none, or one is damaged and not to be skipped.
    """
    if path.is_file():
        return _OnePicture(path, limit)
    return ImageFolder(path, skip_bad, limit, recursive)


class _OnePicture(ImageSet):
    def __init__(self, path: Path, limit: int | None) -> None:
        super().__init__(skip_bad=False)
        check_limit(limit)
        self.images = [ImageRecord(1, path, *read_size(path))]


def _drawn(image: NDArray[np.uint8], masks: FoundMasks) -> Any:
    largest_first = np.argsort(-masks.areas(), kind="stable")
    return draw_segments(image, (masks.mask(int(place)) for place in largest_first))


def _instances(
    dataset: ImageSet,
    annotations: list[tuple[ImageRecord, list[dict[str, Any]]]],
    settings: EverythingSettings,
) -> dict[str, Any]:
    """A COCO instances file; `score` makes each mask one of COCO's results too."""
    masks = [(record.id, mask) for record, masks in annotations for mask in masks]
    return {
        "info": {"description": "automatic mask generation", "settings": settings.to_dict()},
        "images": [
            {
                "id": record.id,
                "file_name": dataset.file_name(record),
                "width": record.width,
                "height": record.height,
            }
            for record, _ in annotations
        ],
        "annotations": [
            {
                "id": number,
                "image_id": image_id,
                "category_id": 1,
                "iscrowd": 0,
                "score": mask["predicted_iou"],
                **mask,
            }
            for number, (image_id, mask) in enumerate(masks, start=1)
        ],
        "categories": [{"id": 1, "name": "object"}],
    }
