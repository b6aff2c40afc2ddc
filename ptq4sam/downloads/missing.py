"""Everything that a request lacks, told at once, with the commands that get it."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from ptq4sam.downloads.catalogue import Asset, asset_at, generated_in
from ptq4sam.errors import MissingError


class Missing:
    """Collects what is not there, so that a user need not find it out piece by piece."""

    def __init__(self) -> None:
        self._items: dict[str, str] = {}
        self._downloads: dict[str, Asset] = {}
        self._commands: dict[str, None] = {}
        self._unpublished = 0

    def __bool__(self) -> bool:
        """Whether anything is missing so far."""
        return bool(self._items)

    def look_for(self, what: str, path: Path | None, otherwise: str = "") -> None:
        """Note a file or folder that is not there.

        Args:
            what: it is, for the message.
            path: where it should be; None where none is needed.
            otherwise: what to do where nobody publishes it; else to name another.
        """
        if path is None or path.exists() or str(path) in self._items:
            return
        asset, scenes = asset_at(path), generated_in(path)
        about = ""
        if asset is not None:
            about = self._about(asset, path)
            self._downloads[asset.name] = asset
        elif scenes is not None:
            self._commands[f"ptq4sam scenes {scenes}"] = None
        else:
            about = otherwise
            self._unpublished += not otherwise
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
            self._commands[install] = None

    def report(self, otherwise: str = "") -> None:
        """Raise an error if anything is missing.

        Args:
            otherwise: how to do without it.

        Raises:
            MissingError: something is; one line names it all.
        """
        if not self._items:
            return
        commands = list(self._commands)
        if self._downloads:
            commands.insert(0, f"ptq4sam download {' '.join(self._downloads)}")
        advice = [f"run {' and '.join(commands)}"] if commands else []
        if self._unpublished:
            advice.append("name others for the rest" if commands else "name another")
        if otherwise:
            advice.append(otherwise)
        found = f"not there: {', '.join(self._items.values())}"
        raise MissingError(f"{found}: {'; '.join(advice)}" if advice else found)

    def _about(self, asset: Asset, path: Path) -> str:
        facts = "the same download" if asset.name in self._downloads else asset.facts
        moved = "" if path in asset.places else f"; it will be {asset.place_of(path)}"
        return f"{facts}{moved}"
