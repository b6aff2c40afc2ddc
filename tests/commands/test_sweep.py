"""`ptq4sam sweep` from end to end: killed, taken up again, shown."""

from __future__ import annotations

import csv
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ptq4sam.cli import main
from ptq4sam.extensions import EXTENSIONS
from ptq4sam.report.writing import write_report
from ptq4sam.sweep import running
from ptq4sam.sweep.description import write_description
from ptq4sam.sweep.grid import read_sweep
from ptq4sam.sweep.store import Store, TrialRecord
from ptq4sam.sweep.tasks import Folder
from tests.tiny_runs import SCHEMES

FILE = f"""
base:
  scheme: {SCHEMES / "minmax44.yaml"}
  scheme.calibrate: 1
  scheme.w_qconfig.observer: MinMaxObserver
  # Small tensors alone, so that no kernel is compiled.
  quantize_encoder: false
  prompting.max_per_image: 4
  limit: 1
  device: cpu
grid:
  bits: [4, 5, 6]
  scheme.a_qconfig.observer: [MinMaxObserver, AvgMinMaxObserver]
"""


def recorded(path: Path) -> list[tuple[str, str]]:
    if not path.exists():
        return []
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        return connection.execute("SELECT name, status FROM trials ORDER BY number").fetchall()
    except sqlite3.OperationalError:
        return []  # it has no table yet
    finally:
        connection.close()


def test_a_killed_sweep_goes_on_and_repeats_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, work = tmp_path / "small.yaml", tmp_path / "w"
    file.write_text(FILE)
    asked = ["sweep", str(file), "--work-dir", str(work), "--jobs", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, "-m", "ptq4sam", *asked],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while len(recorded(work / "sweep.sqlite")) < 2 and process.poll() is None:
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = recorded(work / "sweep.sqlite")
    assert 2 <= len(before) < 6
    shared = {path: path.stat().st_mtime_ns for path in (work / "shared").glob("*.*")}

    assert main(asked) == 0
    after = recorded(work / "sweep.sqlite")
    assert after[: len(before)] == before
    assert len(after) == len(set(after)) == 6
    assert {path: path.stat().st_mtime_ns for path in shared} == shared
    told = capsys.readouterr().out
    assert "float vit_nano" in told

    # A third time there is nothing to do: no worker is started.
    assert main(asked) == 0
    assert recorded(work / "sweep.sqlite") == after
    with (work / "sweep.csv").open() as text:
        rows = list(csv.DictReader(text))
    assert [row["bits"] for row in rows] == ["4", "4", "5", "5", "6", "6"]
    for row in rows:
        assert row["status"] == "done"
        own = sum(float(value) for key, value in row.items() if key.endswith(" seconds"))
        # How much more is measured by benchmarks/sweep_jobs.py.
        assert 0 < own <= float(row["seconds"])
    page = (work / "sweep.md").read_text()
    assert "6 of 6 trials done." in page
    assert page.count("| done |") == 6


def test_mistakes_are_one_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(FILE)

    def refused(*arguments: object) -> str:
        assert main(["sweep", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return " ".join(error.split())

    assert "no such sweep file" in refused(tmp_path / "smal.yaml")
    assert "use 1 or more" in refused(file, "--jobs", "0")
    assert "--annotations go together" in refused(file, "--images", tmp_path)
    assert "--calibration-annotations go" in refused(file, "--calibration-images", tmp_path)
    assert "unknown key; did you mean 'seed'?" in refused(file, "--set", "seeed=1")
    pairs = ["--images", tmp_path, "--annotations", "no.json"]
    pairs += ["--calibration-images", tmp_path, "--calibration-annotations", "no.json"]
    assert "data no.json is not there" in refused(file, *pairs)
    (tmp_path / "sweep.sqlite").write_text("broken" * 100)
    assert "is damaged" in refused(file, "--work-dir", tmp_path)


def test_a_dry_run_lists_the_trials(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "small.yaml").write_text(FILE)
    asked = ["sweep", str(tmp_path / "small.yaml"), "--dry-run", "--work-dir", str(tmp_path / "w")]
    assert main(asked) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "bits=4, observer=MinMaxObserver"
    assert told[6:] == ["6 trials, 0 of them ended before"]
    assert not (tmp_path / "w").exists()


def test_trials_of_another_version_of_an_extension_are_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    file, mine, folder = tmp_path / "s.yaml", tmp_path / "mine.py", Folder(tmp_path / "w")
    file.write_text(FILE)
    mine.write_text("rate = 1\n")
    monkeypatch.setenv(EXTENSIONS, str(mine))
    sweep = read_sweep(file)
    write_description(sweep, folder.description)
    with Store(folder.store) as store:
        for trial in sweep.trials[:2]:
            settings = trial.settings.to_dict()
            store.append(TrialRecord(trial.key, trial.name, "done", 0, settings, ""))
    asked = ["sweep", str(file), "--dry-run", "--work-dir", str(folder.path)]

    def told() -> list[str]:
        assert main(asked) == 0
        return capsys.readouterr().out.splitlines()[6:]

    assert told() == ["6 trials, 2 of them ended before"]
    mine.write_text("rate = 2\n")
    again = f"2 trials ended with other versions of mine.py ({EXTENSIONS}): they do not count"
    assert told() == ["6 trials, 0 of them ended before", again]
    edited = read_sweep(file)
    with Store(folder.store) as store, monkeypatch.context() as patched:
        patched.setattr(running, "plan", lambda *_: [])
        running.finish(edited, folder, store, running.Crew())
    assert again in [record.getMessage() for record in caplog.records]
    write_description(edited, folder.description)
    page = write_report(folder.path).read_text()
    assert "6 of 6 trials are open" in page
    assert again in page
