"""Pictures with masks, boxes and scores; float and quantized side by side."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ptq4sam.data import ImageSet
from ptq4sam.evaluation.pictures import draw_masks, side_by_side, write_picture
from ptq4sam.experiments.evaluate import Picture


class PictureWriter:
    """Writes one JPEG a picture into a folder."""

    def __init__(self, folder: Path, dataset: ImageSet, threshold: float) -> None:
        self._folder, self._threshold = folder, threshold
        self._names = dataset.category_names
        self._stems = Counter(record.path.stem for record in dataset.images)
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, picture: Picture) -> None:
        """Draw one evaluated picture."""
        labels = [self._names.get(int(c), str(c)) for c in picture.prompts.category_ids]
        drawn = [
            draw_masks(
                picture.image,
                segmented.masks,
                picture.prompts.boxes,
                segmented.scores,
                labels,
                self._threshold,
            )
            for segmented in (picture.reference, picture.segmented)
            if segmented is not None
        ]
        result = drawn[0] if len(drawn) == 1 else side_by_side(drawn[0], drawn[1])
        write_picture(result, self._folder / f"{self._file_name(picture)}.jpg")

    def _file_name(self, picture: Picture) -> str:
        """The picture's own name, with its id where another has the same one."""
        stem = picture.record.path.stem
        return stem if self._stems[stem] == 1 else f"{stem}-{picture.record.id}"
