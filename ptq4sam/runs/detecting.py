"""Boxes of a detector for a whole data set, as a file that any later run can take."""

from __future__ import annotations

from pathlib import Path

import torch

from ptq4sam import parallel
from ptq4sam.data import ImageSet
from ptq4sam.downloads import Missing
from ptq4sam.errors import ConfigError
from ptq4sam.numerics import reproducible
from ptq4sam.progress import Progress, silent
from ptq4sam.prompts import CacheFolders, Prompts, PromptSource, cached, open_prompts, write_results
from ptq4sam.prompts.spec import is_boxes_file, look_for_prompts
from ptq4sam.runs.needed import look_for_data
from ptq4sam.runs.settings import DataSettings


@reproducible()
def detect(
    spec: str,
    data: DataSettings,
    path: Path,
    *,
    device: str | torch.device = "cpu",
    limit: int | None = None,
    skip_bad: bool = False,
    cache_dir: Path | None = None,
    progress: Progress = silent,
) -> int:
    """Write the boxes that a prompt source finds in a data set; see `write_boxes`.

    Args:
        spec: the source as `open_prompts` names it.
        data: the pictures; their annotations give ids and categories, where there are some.
        path: the file.
        device: where a detector runs.
        limit: first pictures only.
        skip_bad: skip damaged pictures.
        cache_dir: where boxes are kept that were found before; None for the places of
            `CacheFolders`, beside `path`.
        progress: shows how far it is.

    Raises:
        MissingError: the detector or the data are not there.
        ConfigError: the file has a name by which no boxes could be given again.
    """
    if not is_boxes_file(path.name):
        raise ConfigError(f"asked to write boxes to {path}: name it *.json, as prompts are named")
    missing = Missing()
    look_for_prompts(missing, spec)
    look_for_data(missing, data)
    missing.report()
    dataset = data.open(skip_bad=skip_bad, limit=limit, masks=False)
    kept = CacheFolders.beside(path.parent) if cache_dir is None else CacheFolders(cache_dir)
    source = cached(open_prompts(spec, dataset, device), dataset, kept)
    return write_boxes(dataset, source, path, progress)


def write_boxes(
    dataset: ImageSet, source: PromptSource, path: Path, progress: Progress = silent
) -> int:
    """Write a source's boxes of all pictures as COCO results.

    Several processes (see `parallel`) share the pictures, and the first one writes.

    Args:
        dataset: the pictures.
        source: finds the boxes.
        path: the file.
        progress: shows how far it is.

    Returns:
        How many boxes there are.

    Raises:
        DataError: a picture is damaged and not to be skipped.
    """
    found: list[Prompts] = []
    images = dataset.images
    for record in progress(parallel.share(images), "detecting"):
        image = dataset.load_or_skip(record)
        none = Prompts(record.id, [], [], [])  # type: ignore[arg-type]
        found.append(none if image is None else source.prompts(record, image))
    every = parallel.gather(found)
    if parallel.is_first():
        write_results(every, path)
    return sum(map(len, every))
