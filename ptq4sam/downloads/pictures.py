"""The pictures that calibration takes, one by one instead of an archive of a hundred thousand."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ptq4sam.downloads.catalogue import CALIBRATION_PICTURES, Asset
from ptq4sam.downloads.fetch import OnBytes, fetch
from ptq4sam.errors import DataError, DownloadError
from ptq4sam.files import read_json, write_text


@dataclass(frozen=True)
class Listed:
    """A picture as an instances file names it, with its size in pixels."""

    name: str
    width: int
    height: int


def fetch_pictures(
    asset: Asset, root: Path, on_bytes: OnBytes = lambda done, total: None, **patience: Any
) -> Path:
    """Download the first annotated pictures of an instances file, and list them.

    Their publisher states no checksums: each has to be a JPEG that can be decoded and has the width
    and height that the instances file, which came with a checksum, says.

    Args:
        asset: one with `of` and `pictures`.
        root: the repository's root.
        on_bytes: shows how far it is.
        patience: `attempts` and `pause` of `fetch`.

    Returns:
        The folder of the pictures.

    Raises:
        DownloadError: as of `fetch`, or a picture is another than the instances file says.
        DataError: the instances file is missing or damaged.
    """
    if asset.of is None or asset.pictures is None:
        raise ValueError(f"{asset.name} is no list of pictures")
    listed = list(first_annotated(root / asset.of))
    done = 0
    for picture in listed:
        path = asset.pictures / picture.name
        one = Asset(f"{asset.name}: {picture.name}", path, asset.url + picture.name, asset.licence)
        if (root / path).exists() and _problem(root / path, picture) is not None:
            (root / path).unlink()
        fetch(one, root, functools.partial(_count, on_bytes, done), **patience)
        problem = _problem(root / path, picture)
        if problem is not None:
            (root / path).unlink()
            raise DownloadError(f"{one.name}: a wrong file came and was deleted ({problem})")
        done += (root / path).stat().st_size
    write_text("".join(f"{picture.name}\n" for picture in listed), root / asset.path)
    return root / asset.pictures


def _count(on_bytes: OnBytes, before: int, done: int, _total: int | None) -> None:
    """Show the bytes of one picture behind those of the pictures before it."""
    on_bytes(before + done, None)


def first_annotated(instances: Path) -> Iterator[Listed]:
    """The first CALIBRATION_PICTURES pictures with annotations, in the file's order.

    Raises:
        DataError: the file is missing or damaged.
    """
    content, _ = read_json(instances, "annotations file")
    try:
        annotated = {annotation["image_id"] for annotation in content["annotations"]}
        chosen = [image for image in content["images"] if image["id"] in annotated]
        for image in chosen[:CALIBRATION_PICTURES]:
            # The file's name alone: it becomes a part of a path.
            yield Listed(Path(image["file_name"]).name, image["width"], image["height"])
    except (KeyError, TypeError) as error:
        raise DataError(f"{instances} is not in COCO format: {error}") from error


def _problem(path: Path, listed: Listed) -> str | None:
    """Why a file is not the picture."""
    try:
        with Image.open(path, formats=["JPEG"]) as picture:
            picture.load()
            size = picture.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"it is no whole JPEG: {error}"
    wanted = (listed.width, listed.height)
    return (
        None
        if size == wanted
        else f"it has {size[0]} x {size[1]} pixels, not {wanted[0]} x {wanted[1]}"
    )
