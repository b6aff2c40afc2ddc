"""Folders and files that one process writes at a time."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ptq4sam.errors import StoreError, reason

_log = logging.getLogger(__name__)

LOCK = "run.lock"
"""The file in a folder that is locked; it stays, and without a lock it means nothing."""


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Nobody else is in this block with the folder, whatever process or thread.

    The lock is the system's: it ends with the process, however that ends. Whoever only reads the
    folder needs none.

    Args:
        folder: made where it is missing.

    Raises:
        StoreError: somebody is.
        OSError: the lock file cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / LOCK) as free:
        if not free:
            raise StoreError(
                f"{folder} is in use by another run, or belongs to a sweep that is running: wait "
                "for its end, or name another folder"
            )
        yield


@contextlib.contextmanager
def one_after_another(path: Path) -> Iterator[None]:
    """Whoever comes to this block with the same file waits until it is left.

    Args:
        path: the file, whose folder is there; a hidden file beside it is locked.

    Raises:
        OSError: the lock file cannot be made.
    """
    lock = path.with_name(f".{path.name}.lock")
    with _locked(lock) as free:
        if free:
            yield
            return
    _log.info("another process is at %s: waiting for it", path)
    with _locked(lock, wait=True):
        yield


@contextlib.contextmanager
def _locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """Hold a file's lock; False where another holds it."""
    lock = FileLock(path, timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    except OSError as error:
        if error.filename is not None:
            raise
        # The file is there, but its file system has no locks, as some in a network.
        _log.warning("%s cannot be locked (%s): see that nobody else uses it", path, reason(error))
    try:
        yield True
    finally:
        lock.release()
