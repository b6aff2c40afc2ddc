"""Data sets by one word: a name, a configuration, an annotations file or a folder."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal

from ptq4sam.data.file_names import PictureFinder, named_file
from ptq4sam.downloads import where_from
from ptq4sam.errors import ConfigError, DataError
from ptq4sam.files import read_json
from ptq4sam.nearest import nearest
from ptq4sam.runs.configs.experiment import DataConfig
from ptq4sam.runs.configs.literals import load_config
from ptq4sam.shipped import CONFIGS, located

NAMED = CONFIGS / "_base_"
"""Folder of the configurations that name a data set, below the repository."""

Section = Literal["data", "calibration"]


def find_dataset(given: str, section: Section = "data", named: Path | None = None) -> DataConfig:
    """The data set that one word means.

    Args:
        given: a name, which is that of a file in `named` that has a section `data` (coco,
            coco_mini, scenes); a configuration FILE.py with such a section; a COCO instances
            FILE.json, whose pictures are looked for beside it; or a folder of pictures without
            annotations.
        section: of a configuration: what is scored, or what is calibrated on.
        named: the folder of names; None for NAMED, here or as it ships.

    Raises:
        ConfigError: it is none of these, or the configuration is damaged or has no such section.
        DataError: the instances file is missing or damaged, or its pictures are not beside it.
    """
    named = located(NAMED) if named is None else named
    path = Path(given)
    if path.name.endswith((".json", ".json.gz")):
        if not path.exists():
            raise DataError(f"there is no annotations file {path}: {where_from(path)}")
        return DataConfig(images_beside(path), path)
    if path.suffix == ".py":
        return _configured(path, section)
    names = sorted(p.stem for p in named.glob("*.py") if "data" in load_config(p))
    if given in names:
        return _configured(named / f"{given}.py", section)
    if path.is_dir():
        return DataConfig(path)
    near = nearest(given, names)
    hint = f"did you mean {near}? " if near else ""
    known = f"there are {', '.join(names)} in {named}" if names else f"there are none in {named}"
    raise ConfigError(
        f"no data set is named {given!r}: {hint}{known}; or give a configuration .py, "
        "a COCO annotations .json or a folder of pictures"
    )


def images_beside(annotations: Path) -> Path:
    """The folder of an instances file's pictures.

    It is the one that holds most of the file's pictures: the file's own folder or the one above
    (data/coco of data/coco/annotations/instances_val2017.json), a folder in one of these, or a
    folder in their folder "images"; the first of equals.

    Raises:
        DataError: the file is missing or damaged, or no such folder holds a picture.
    """
    content, _ = read_json(annotations, "annotations file")
    names = _pictures(content)
    if not names:
        raise DataError(f"{annotations} is not in COCO format: it names no picture")
    held = {folder: _held(folder, names) for folder in _folders_near(annotations)}
    if not any(held.values()):
        raise DataError(
            f"the pictures of {annotations} were looked for beside it, but no folder there has "
            f"{names[0]}: give their folder too"
        )
    return max(held, key=held.__getitem__)


def _held(folder: Path, names: Collection[str]) -> int:
    """How many of the pictures lie in a folder."""
    finder = PictureFinder(folder, names)
    return sum(finder.find(name) is not None for name in names)


def _configured(path: Path, section: Section) -> DataConfig:
    config = load_config(path)
    if section not in config:
        raise ConfigError(f"{path}: {section}: missing; a data set's configuration needs one")
    return DataConfig.from_dict(config[section], path)


def _pictures(content: Any) -> list[str]:
    images = content.get("images") if isinstance(content, dict) else None
    entries = images if isinstance(images, list) else []
    names = [named_file(entry) for entry in entries if isinstance(entry, dict)]
    return [name for name in names if isinstance(name, str) and name]


def _folders_near(annotations: Path) -> Iterator[Path]:
    # Resolved, so that the folder above a file in the current one is known.
    own = annotations.resolve().parent
    for base in (own, own.parent):
        yield base
        yield from _subfolders(base)
        yield from _subfolders(base / "images")


def _subfolders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
