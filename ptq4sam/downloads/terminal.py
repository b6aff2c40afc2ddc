"""Downloads as the command line shows them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from ptq4sam.downloads.catalogue import ASSETS, find_asset
from ptq4sam.downloads.fetch import fetch, state_of

_log = logging.getLogger(__name__)


def listing(root: Path) -> list[str]:
    """A table of everything that can be downloaded, and whether it is below `root`."""
    rows = [("name", "state", "size", "licence", "place")]
    for asset in ASSETS.values():
        state, place = state_of(asset, root).value, asset.places[0]
        rows.append((asset.name, state, asset.size_text, asset.licence, str(place)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def download(names: Sequence[str], root: Path) -> None:
    """Get files by name, with a bar for each.

    Raises:
        ConfigError: a name is unknown; nothing was downloaded then.
        DownloadError: a file cannot be had.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TimeRemainingColumn

    assets = [find_asset(name) for name in names]
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for asset in assets:
            task = progress.add_task(asset.name, total=asset.size)

            def show(done: int, total: int | None, task: TaskID = task) -> None:
                progress.update(task, completed=done, total=total)

            place = fetch(asset, root, show)
            _log.info("%s is in %s", asset.name, place)
