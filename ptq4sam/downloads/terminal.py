"""Downloads as the command line shows them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

from ptq4sam.columns import aligned
from ptq4sam.downloads.catalogue import ASSETS, Asset, find_asset
from ptq4sam.downloads.fetch import OnBytes, State, fetch, state_of
from ptq4sam.downloads.pictures import fetch_pictures
from ptq4sam.progress import Ticker

_log = logging.getLogger(__name__)


def listing(root: Path, width: int | None = None) -> list[str]:
    """A table of everything that can be downloaded, and whether it is below `root`.

    Args:
        root: folder of ckpt/ and data/.
        width: of the terminal; None for no limit.
    """
    lines = [["name", "state", "size"]]
    for heading, assets in groupby(sorted(ASSETS.values(), key=_heading), key=_heading):
        lines.append([heading])
        lines += [[one.name, state_of(one, root).value, one.size_text] for one in assets]
    return aligned(lines, {0, 1}, width)


def _heading(asset: Asset) -> str:
    return f"{asset.path.parent.as_posix()}/, {asset.licence}:"


def download(names: Sequence[str], root: Path) -> None:
    """Get files by name, and what they need, with a bar or now and then a line for each.

    Raises:
        ConfigError: a name is unknown; nothing was downloaded then.
        DownloadError: a file cannot be had.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for asset in _with_needs(names, root):
            task = progress.add_task(asset.name, total=asset.size)
            show = functools.partial(progress.update, task)
            place = _get(asset, root, _Bytes(asset.name, show, silent=console.is_terminal))
            _log.info("%s is in %s", asset.name, place)


class _Bytes:
    """Shows how far one download is: its bar, or a line now and then."""

    def __init__(self, name: str, bar: Callable[..., None], silent: bool) -> None:
        self._name, self._bar, self._silent = name, bar, silent
        self._ticker = Ticker()

    def __call__(self, done: int, total: int | None) -> None:
        self._bar(completed=done, total=total)
        whole = "" if total is None else f" of {total / 1e6:.0f}"
        if not self._silent:
            self._ticker.tell(lambda: f"{self._name}: {done / 1e6:.0f}{whole} MB")


def _with_needs(names: Sequence[str], root: Path) -> list[Asset]:
    """What was asked for, each after what it needs and lacks."""
    assets: dict[str, Asset] = {}
    for asset in [find_asset(name) for name in names]:
        needed = None if asset.needs is None else find_asset(asset.needs)
        if needed is not None and state_of(needed, root) is not State.THERE:
            assets[needed.name] = needed
        assets[asset.name] = asset
    return list(assets.values())


def _get(asset: Asset, root: Path, show: OnBytes) -> Path:
    return fetch(asset, root, show) if asset.of is None else fetch_pictures(asset, root, show)
