"""A folder that one process writes into at a time."""

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
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise StoreError(
            f"{folder} is in use by another run, or belongs to a sweep that is running: wait for "
            "its end, or name another work directory"
        ) from None
    except OSError as error:
        if error.filename is not None:
            raise
        # The file is there, but its file system has no locks, as some in a network.
        _log.warning(
            "%s cannot be locked (%s): see that no other run uses it", folder, reason(error)
        )
    try:
        yield
    finally:
        lock.release()
