"""Pictures with masks, boxes and scores; float and quantized side by side."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ptq4sam.data import ImageSet
from ptq4sam.evaluation.evaluate import Picture
from ptq4sam.evaluation.pictures import draw_masks, side_by_side, write_picture


class PictureWriter:
    """Writes one JPEG a picture into a folder."""

    def __init__(self, folder: Path, dataset: ImageSet, threshold: float) -> None:
        self._folder, self._threshold = folder, threshold
        self._names = dataset.category_names
        self._file_names = file_names(dataset)
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
        write_picture(result, self._folder / f"{self._file_names[picture.record.id]}.jpg")


def file_names(dataset: ImageSet) -> dict[int, str]:
    """For each picture's id its own name, with the id where another has the same one."""
    stems = {record.id: record.path.stem for record in dataset.images}
    times = Counter(stems.values())
    with_ids = {id_: f"{stem}-{id_}" for id_, stem in stems.items()}
    names = {id_: stem if times[stem] == 1 else with_ids[id_] for id_, stem in stems.items()}
    # A picture may be called as another is with its id.
    return names if len(set(names.values())) == len(names) else with_ids
