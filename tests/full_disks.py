"""Folders that take names but no bytes, in two ways."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

FullDisk = Callable[[], contextlib.AbstractContextManager[str]]
"""Fills the disk for a `with` block; gives what the system says then."""


@contextlib.contextmanager
def no_bytes() -> Iterator[str]:
    """No file of this process grows: the system's limit, which needs no rights.

    Output of the test must be captured by `capsys`, in memory.
    """
    resource = pytest.importorskip("resource", reason="limits of files are Unix's")
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN, "Python ignores it"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield os.strerror(errno.EFBIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    """A file system in memory at a folder; skips the test where that is not allowed."""
    command = ["mount", "-t", "tmpfs", "-o", ",".join(("size=64k", *options)), "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if done.returncode != 0:
        pytest.skip(f"file systems cannot be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        # Lazily: what failed may still be open.
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def filled(folder: Path) -> Iterator[str]:
    """A full disk at a folder."""
    with mounted(folder):
        with contextlib.suppress(OSError), (folder / "full").open("wb", buffering=0) as file:
            while file.write(bytes(1024)):
                pass
        yield os.strerror(errno.ENOSPC)


@pytest.fixture(params=["limit", "mount"])
def full_disk(request: pytest.FixtureRequest, tmp_path: Path) -> FullDisk:
    """The disk of the test's folder `d`."""
    folder = tmp_path / "d"
    folder.mkdir()
    return no_bytes if request.param == "limit" else lambda: filled(folder)
