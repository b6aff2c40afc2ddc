"""A folder that one process writes into at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import filelock
import pytest

from ptq4sam.errors import StoreError
from ptq4sam.locks import alone_in

HOLDER = """
import sys
from pathlib import Path
from ptq4sam.locks import alone_in
with alone_in(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """A process that has the folder until its input ends."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


def test_a_second_one_is_told(tmp_path: Path) -> None:
    told = r"new is in use by another run.*another work directory"
    with (
        alone_in(tmp_path / "new"),
        alone_in(tmp_path / "other"),
        pytest.raises(StoreError, match=told),
        alone_in(tmp_path / "new"),
    ):
        raise AssertionError("two are in")
    with alone_in(tmp_path / "new"):
        pass


def test_a_killed_process_leaves_the_folder_free(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        with pytest.raises(StoreError), alone_in(tmp_path):
            raise AssertionError("two are in")
        process.kill()
    with alone_in(tmp_path):
        pass


def test_a_file_system_without_locks_only_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_lock: filelock.BaseFileLock) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with alone_in(tmp_path):
        pass
    assert "cannot be locked (No locks available)" in caplog.text


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), alone_in(tmp_path / "file" / "w"):
        pass
