"""Files of pictures by the names that an instances file gives them, which often differ a little."""

from __future__ import annotations

import glob
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote

_OF_2014 = re.compile(r"coco_(?:train|val|test)2014_")


def named_file(entry: Mapping[str, Any]) -> Any:
    """What an entry of "images" calls its file: `file_name`, or in LVIS the end of `coco_url`.

    A `file_name` that is an address is one, too.
    """
    name, url = entry.get("file_name"), entry.get("coco_url")
    if isinstance(name, str) and "://" in name:
        url = name
    elif name not in (None, "") or not isinstance(url, str):
        return name
    _, absolute, rest = url.partition("://")
    path = rest.partition("/")[2] if absolute else url
    return unquote(path.partition("?")[0])


class PictureFinder:
    r"""Finds pictures below a folder.

    A file is taken by the name as it is written, else by the name in another case (.JPG), with / in
    the place of \, or in another Unicode form (macOS writes the letter and the accent of é as two);
    then without the folders that lie above (img/a.png in the folder img), and at last without any
    of its folders, if no other picture has that name without folders. A name without a suffix (a)
    is that of the only file that has one besides (a.png).

    Args:
        folder: holds the pictures.
        names: of all pictures.

    Attributes:
        renamed: the file of each name that was not taken as written.
    """

    def __init__(self, folder: Path, names: Collection[str]) -> None:
        self.folder = folder
        self.renamed: dict[str, Path] = {}
        self._names = names
        self._listings: dict[Path, frozenset[str]] = {}
        self._plain_listings: dict[Path, dict[str, str | None]] = {}

    def find(self, name: str) -> Path | None:
        """The file of a picture, or None if there is none."""
        path = self.folder / name
        if path.name in self._listed(path.parent) or path.is_file():
            return path
        for parts in self._readings(name):
            found = self._below(parts)
            if found is not None:
                self.renamed[name] = found
                return found
        return None

    def advice(self, name: str) -> str:
        """Which other folder has a picture that was not found, for a message; "" for none."""
        split = name.partition("/")[0] if "/" in name else None
        path = self.folder / name
        others = [n for n in self._listed(path.parent) if Path(n).stem == path.stem]
        if others:
            return f"; there is {path.with_name(min(others))}: correct its file_name"
        above = self.folder.parent / name
        if above.is_file():
            return f"; there is {above}: give {self.folder.parent}"
        last = _parts(name.replace("\\", "/"))[-1:]
        below = sorted(self.folder.glob(f"*/{glob.escape(last[0])}")) if last else []
        if below:
            return f"; there is {below[0]}: give {below[0].parent}"
        if split is None or (self.folder / split).is_dir():
            return ""
        asked = sum(other.startswith(f"{split}/") for other in self._names)
        return f"; {asked} pictures are in {split}, and {self.folder} has no such folder: add it"

    def _readings(self, name: str) -> Iterator[list[str]]:
        """Other ways to read a name, each as plain parts, as long as they mean no other picture."""
        parts = _parts(_plain(name))
        whole, last = self._counts
        above = [_plain(part) for part in self.folder.absolute().parts]
        for dropped in range(len(parts)):
            rest = parts[dropped:]
            is_only = last[rest[-1]] == 1 or (dropped == 0 and whole["/".join(parts)] == 1)
            if is_only or (dropped and parts[:dropped] == above[-dropped:]):
                yield rest
        # COCO's files had the split in their names until 2014.
        if parts and last[parts[-1]] == 1 and (of_2014 := _OF_2014.match(parts[-1])):
            yield [parts[-1][of_2014.end() :]]

    def _below(self, parts: list[str]) -> Path | None:
        place = self.folder
        for part in parts:
            name = self._plainly_listed(place).get(part)
            if name is None:
                return None
            place = place / name
        return place

    @cached_property
    def _counts(self) -> tuple[Counter[str], Counter[str]]:
        """How many pictures have a name, with folders and without, in plain form."""
        split = [_parts(_plain(name)) for name in set(self._names)]
        return (
            Counter("/".join(parts) for parts in split),
            Counter(parts[-1] for parts in split if parts),
        )

    def _listed(self, folder: Path) -> frozenset[str]:
        # One listing instead of a hundred thousand look-ups, which network disks are slow at.
        if folder not in self._listings:
            self._listings[folder] = frozenset(os.listdir(folder) if folder.is_dir() else ())
        return self._listings[folder]

    def _plainly_listed(self, folder: Path) -> dict[str, str | None]:
        """Names in a folder by their plain form, with suffix and without; None if ambiguous."""
        if folder not in self._plain_listings:
            listing: dict[str, str | None] = {}
            for name in self._listed(folder):
                plain = _plain(name)
                listing[plain] = None if plain in listing else name
            stems = Counter(_plain(Path(name).stem) for name in self._listed(folder))
            for name in self._listed(folder):
                stem = _plain(Path(name).stem)
                if stems[stem] == 1:
                    listing.setdefault(stem, name)
            self._plain_listings[folder] = listing
        return self._plain_listings[folder]


def _plain(name: str) -> str:
    """The same for names that differ in case, Unicode form, the sign between folders or spaces."""
    return unicodedata.normalize("NFC", name.replace("\\", "/")).casefold().strip()


def _parts(name: str) -> list[str]:
    return [part for part in name.split("/") if part not in ("", ".")]
