"""Get a file over HTTP: resume what was begun, check what came, unpack what is packed."""

from __future__ import annotations

import enum
import hashlib
import http.client
import os
import shutil
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

from ptq4sam.contents import otherwise
from ptq4sam.downloads.catalogue import Asset
from ptq4sam.errors import DownloadError
from ptq4sam.files import naming
from ptq4sam.locks import one_after_another

_CHUNK = 2**20
_TIMEOUT = 30.0
_WEIGHTS = (".pth", ".pt", ".safetensors")
_CUT = (http.client.HTTPException, ConnectionError, TimeoutError)

OnBytes = Callable[[int, int | None], None]
"""Told the bytes there are, and all there will be, where the server says so."""


class State(enum.Enum):
    """Whether an asset is here."""

    THERE = "there"
    PARTIAL = "partly there"
    MISSING = "missing"


def state_of(asset: Asset, root: Path) -> State:
    """Whether an asset is below `root`; an unpacked archive need not be kept."""
    places = [root / place for place in asset.places]
    if asset.pictures is not None and places[0].exists():
        names = places[0].read_text(encoding="utf-8").splitlines()
        places += [root / asset.pictures / name for name in names]
    if all(place.exists() for place in places):
        return State.THERE
    started = _partial(root / asset.path).exists() or (root / asset.path).exists()
    return State.PARTIAL if started else State.MISSING


def fetch(
    asset: Asset,
    root: Path,
    on_bytes: OnBytes = lambda done, total: None,
    attempts: int = 4,
    pause: float = 1.0,
) -> Path:
    """Download an asset to its place below `root`, and unpack it if it is an archive.

    What was begun goes on; a connection that is cut is tried again. The file takes its name only
    once it is whole and its checksum is right. Who comes while another process fetches the same
    waits for it.

    Args:
        asset: what.
        root: the repository's root.
        on_bytes: shows how far it is.
        attempts: how often a connection may be cut without a byte having come.
        pause: seconds before the second attempt, doubled each time.

    Returns:
        The file, or the folder it was unpacked into.

    Raises:
        DownloadError: no network, no such file, another file than the publisher's, no room.
    """
    target = root / asset.path
    target.parent.mkdir(parents=True, exist_ok=True)
    with one_after_another(target):
        return _fetch(asset, root, on_bytes, attempts, pause)


def _fetch(asset: Asset, root: Path, on_bytes: OnBytes, attempts: int, pause: float) -> Path:
    """The same for the only one who fetches this file."""
    target = root / asset.path
    if state_of(asset, root) is State.THERE:
        return target if asset.unpacked is None else root / asset.unpacked
    if not target.exists():
        partial = _partial(target)
        _receive(asset, partial, on_bytes, attempts, pause)
        _check(asset, partial)
        os.replace(partial, target)
        _tag_file(partial).unlink(missing_ok=True)
    return target if asset.unpacked is None else _unpack(asset, target, root / asset.unpacked)


def _partial(target: Path) -> Path:
    return target.with_name(target.name + ".partial")


def _tag_file(partial: Path) -> Path:
    return partial.with_name(partial.name + ".etag")


def _by_hand(asset: Asset) -> str:
    return f"try again later, or fetch {asset.url} by other means and put it at {asset.path}"


def _receive(asset: Asset, partial: Path, on_bytes: OnBytes, attempts: int, pause: float) -> None:
    """Append to the partial file until it is whole."""
    failures = 0
    while True:
        before = _size(partial)
        try:
            if _receive_some(asset, partial, on_bytes):
                return
            problem = "the connection was cut"
        except urllib.error.HTTPError as error:
            if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                # The server has no more than there is: whether that is the file is seen next.
                return
            if error.code < 500:
                raise DownloadError(
                    f"{asset.name}: the server says {error.code} {error.reason}: {_by_hand(asset)}"
                ) from error
            problem = f"the server says {error.code} {error.reason}"
        except urllib.error.URLError as error:
            problem = f"no connection ({error.reason}); is there a network?"
        except _CUT as error:
            problem = f"the connection was cut ({error})"
        failures = 0 if _size(partial) > before else failures + 1
        if failures >= attempts:
            have = _size(partial)
            kept = f" after {have:,} bytes, which are kept" if have else ""
            raise DownloadError(f"{asset.name}: {problem}{kept}: {_by_hand(asset)}")
        time.sleep(pause * 2 ** max(0, failures - 1))


def _receive_some(asset: Asset, partial: Path, on_bytes: OnBytes) -> bool:
    """One connection; returns whether the file is whole.

    Raises:
        DownloadError: the server has another file, or there is no room for it.
    """
    have, tag_file = _size(partial), _tag_file(partial)
    request = urllib.request.Request(asset.url, headers={"User-Agent": "ptq4sam"})
    if have:
        request.add_header("Range", f"bytes={have}-")
        if tag_file.exists():
            request.add_header("If-Range", tag_file.read_text(encoding="ascii"))
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
        if response.headers.get_content_type() == "text/html":
            raise DownloadError(
                f"{asset.name}: the server sent a web page instead of the file: {_by_hand(asset)}"
            )
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            # It does not resume, or has another file by now.
            have = 0
        length = response.headers.get("Content-Length")
        total = None if length is None else have + int(length)
        _check_total(asset, partial, total, have)
        tag = response.headers.get("ETag")
        if tag and not tag.startswith("W/"):
            with naming(partial):
                tag_file.write_text(tag, encoding="ascii")
        with partial.open("ab" if have else "wb") as file:
            while chunk := response.read(_CHUNK):
                with naming(partial):
                    file.write(chunk)
                    file.flush()
                have += len(chunk)
                on_bytes(have, total)
    wanted = asset.size if asset.size is not None else total
    return wanted is None or have >= wanted


def _check_total(asset: Asset, partial: Path, total: int | None, have: int) -> None:
    if total is None:
        return
    if asset.size is not None and total > asset.size:
        raise DownloadError(
            f"{asset.name}: the server has {total:,} bytes, the publisher's file has "
            f"{asset.size:,}: {_by_hand(asset)}"
        )
    free = shutil.disk_usage(partial.parent).free
    if total - have > free:
        raise DownloadError(
            f"{asset.name}: {total - have:,} bytes are to come, {free:,} are free in "
            f"{partial.parent}: make room"
        )


def _check(asset: Asset, partial: Path) -> None:
    """Compare size and checksum; a wrong file is deleted, for going on with it cannot mend it."""
    problem = None
    instead = otherwise(partial) if asset.path.suffix in _WEIGHTS else None
    if asset.size is not None and _size(partial) != asset.size:
        problem = f"{_size(partial):,} bytes came, the publisher's file has {asset.size:,}"
    elif asset.digest is not None:
        found = _digest(partial, asset.digest.algorithm)
        if not found.startswith(asset.digest.beginning):
            problem = (
                f"its {asset.digest.algorithm} is {found}, the publisher's begins with "
                f"{asset.digest.beginning}"
            )
    elif instead is not None:
        problem = f"it {instead}"
    if problem is not None:
        partial.unlink()
        _tag_file(partial).unlink(missing_ok=True)
        raise DownloadError(f"{asset.name}: a wrong file came and was deleted ({problem})")


def _unpack(asset: Asset, archive: Path, folder: Path) -> Path:
    """Unpack a ZIP archive beside its place, then move what was in it, so that no half is used."""
    aside = folder / f".{archive.name}.unpacking"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with naming(aside), zipfile.ZipFile(archive) as packed:
            packed.extractall(aside)
    except zipfile.BadZipFile as error:
        raise DownloadError(
            f"{asset.name}: {archive} is no ZIP archive ({error}): delete it and download again"
        ) from error
    for entry in aside.iterdir():
        _move(entry, folder / entry.name)
    aside.rmdir()
    return folder


def _move(source: Path, place: Path) -> None:
    """Rename, or move into a folder that is there already."""
    if source.is_dir() and place.is_dir():
        for entry in source.iterdir():
            _move(entry, place / entry.name)
        source.rmdir()
    else:
        os.replace(source, place)


def _digest(path: Path, algorithm: str) -> str:
    state = hashlib.new(algorithm)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
    return state.hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
