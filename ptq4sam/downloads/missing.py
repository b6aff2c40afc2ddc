"""Everything that a request lacks, told at once, with the commands that get it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from ptq4sam.columns import aligned, wrapped
from ptq4sam.downloads.catalogue import Asset, asset_at, generated_in
from ptq4sam.errors import MissingError


class Missing:
    """Collects what is not there, so that a user need not find it out piece by piece."""

    def __init__(self) -> None:
        self._items: dict[str, str] = {}
        self._rows: dict[str, list[str]] = {}
        self._downloads: dict[str, Asset] = {}
        self._commands: dict[str, None] = {}
        self._unpublished = 0

    def __bool__(self) -> bool:
        """Whether anything is missing so far."""
        return bool(self._items)

    def look_for(
        self, what: str, path: Path | None, otherwise: str = "", enough: int | None = None
    ) -> None:
        """Note a file or folder that is not there.

        Args:
            what: it is, for the message.
            path: where it should be; None where none is needed.
            otherwise: what to do where nobody publishes it; else to name another.
            enough: of a folder of pictures: how many of the first annotated ones are needed.
        """
        if path is None or path.exists() or str(path) in self._items:
            return
        asset, scenes = asset_at(path, enough), generated_in(path)
        about, size, place = "", "", ""
        if asset is not None:
            again = asset.name in self._downloads
            about = self._about(asset, path)
            size = "the same" if again else asset.size_text
            place = "" if again else urlsplit(asset.url).netloc
            self._downloads[asset.name] = asset
        elif scenes is not None:
            self._commands[f"ptq4sam scenes {scenes}"] = None
        else:
            about = otherwise
            self._unpublished += not otherwise
        self._rows[str(path)] = [f"  {what} {path}", size, place]
        if asset is None and about:
            self._rows[str(path)] = [f"  {what} {path}: {about}", "", ""]
        self._items[str(path)] = f"{what} {path}" + (f" ({about})" if about else "")

    def look_for_packages(self, what: str, packages: Iterable[str], install: str) -> None:
        """Note packages that are not installed.

        Args:
            what: needs them, for the message.
            packages: names to import.
            install: the command that installs them.
        """
        absent = [name for name in packages if find_spec(name) is None]
        if absent:
            self._items[what] = f"{', '.join(absent)} (packages that {what} needs)"
            self._rows[what] = [f"  {self._items[what]}", "", ""]
            self._commands[install] = None

    def report(self, otherwise: str = "") -> None:
        """Raise an error if anything is missing.

        Args:
            otherwise: how to do without it.

        Raises:
            MissingError: something is; its message, and its listing, name it all.
        """
        if not self._items:
            return
        commands = list(self._commands)
        if self._downloads:
            commands.insert(0, f"ptq4sam download {' '.join(self._downloads)}")
        rest = []
        if self._unpublished:
            rest.append("name others for the rest" if commands else "name another")
        if otherwise:
            rest.append(otherwise)
        advice = [f"run {' and '.join(commands)}", *rest] if commands else rest
        found = f"not there: {', '.join(self._items.values())}"
        message = f"{found}: {'; '.join(advice)}" if advice else found
        if len(self._items) == 1 and not self._downloads:
            raise MissingError(message)  # short enough for a line
        raise MissingError(message, "\n".join(self._lines(commands, rest)))

    def _lines(self, commands: Sequence[str], rest: Sequence[str]) -> list[str]:
        """What is missing, how large it is and where it comes from; the commands; other ways."""
        width = shutil.get_terminal_size().columns
        titles = ["not there:", "size", "from"]
        if any(row[1] for row in self._rows.values()):
            lines = aligned([titles, *self._rows.values()], {0, 1, 2}, width)
        else:
            lines = [titles[0], *(row[0] for row in self._rows.values())]
        if commands:
            lines += ["run", *(f"  {command}" for command in commands)]
        return lines + [wrapped(text, width) for text in rest]

    def _about(self, asset: Asset, path: Path) -> str:
        facts = "the same download" if asset.name in self._downloads else asset.facts
        moved = "" if path in asset.places else f"; it will be {asset.place_of(path)}"
        return f"{facts}{moved}"
