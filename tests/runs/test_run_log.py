"""The log in a work directory, also where nothing can be written any more."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from ptq4sam.errors import ResourceError
from ptq4sam.runs.run_log import logging_to
from tests.full_disks import FullDisk, full_disk

__all__ = ["full_disk"]

_log = logging.getLogger("ptq4sam.tests")


def test_what_is_logged_is_in_the_file(tmp_path: Path) -> None:
    with logging_to(tmp_path / "run.log"):
        _log.info("Übung 漢字")
    _log.info("after it")
    lines = (tmp_path / "run.log").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1
    assert lines[0].endswith("INFO ptq4sam.tests: Übung 漢字")


def test_details_are_in_the_file(tmp_path: Path) -> None:
    with logging_to(tmp_path / "run.log"):
        _log.debug("a detail")
    assert "DEBUG ptq4sam.tests: a detail" in (tmp_path / "run.log").read_text()


def test_an_error_that_nobody_expects_leaves_its_traceback(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    with pytest.raises(ZeroDivisionError), logging_to(path):
        raise ZeroDivisionError("nothing\nthere")
    log = path.read_text().splitlines()
    assert "Traceback (most recent call last):" in log
    assert log[-1].endswith("stopped: nothing there")
    with pytest.raises(ResourceError), logging_to(path):
        raise ResourceError("full")
    (line,) = path.read_text().splitlines()
    assert line.endswith("stopped: full")


def test_a_full_disk_ends_the_run_with_one_line(
    tmp_path: Path, full_disk: FullDisk, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "d" / "run.log"
    with full_disk() as reason, pytest.raises(ResourceError) as caught, logging_to(path):
        _log.info("x" * 10_000)
    assert str(caught.value).startswith(f"{path}: {reason}: make room")
    assert capsys.readouterr().err == ""
    # Nobody listens any more.
    _log.info("after it")


def test_the_log_does_not_hide_why_a_run_ended(
    tmp_path: Path, full_disk: FullDisk, capsys: pytest.CaptureFixture[str]
) -> None:
    with full_disk(), pytest.raises(ZeroDivisionError), logging_to(tmp_path / "d" / "run.log"):
        raise ZeroDivisionError
    assert capsys.readouterr().err == ""


def test_a_mistake_in_a_log_call_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # To pytest's own handler it is an error.
    monkeypatch.setattr(logging.getLogger("ptq4sam"), "propagate", False)
    with logging_to(tmp_path / "run.log"):
        _log.info("%d", "no number")
        _log.info("goes on")
    assert "goes on" in (tmp_path / "run.log").read_text(encoding="utf-8")
    assert "no number" in capsys.readouterr().err


def test_a_device_that_is_full(capsys: pytest.CaptureFixture[str]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    told = rf"^/dev/full: {os.strerror(28)}: make room"
    with pytest.raises(ResourceError, match=told), logging_to(Path("/dev/full")):
        _log.info("one line")
    assert capsys.readouterr().err == ""
