from __future__ import annotations

import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from ptq4sam.cli import main
from ptq4sam.extensions import EXTENSIONS
from ptq4sam.report.writing import write_report
from ptq4sam.sweep.description import read_description, write_description
from ptq4sam.sweep.grid import Sweep, read_sweep
from ptq4sam.sweep.store import Store, TrialRecord
from ptq4sam.sweep.tasks import Folder
from tests.report.conftest import Browser
from tests.tiny_runs import SCHEMES

BIMODAL = SCHEMES / "sweeps" / "bimodal.yaml"


def score(number: int) -> float:
    return 0.4 + 0.01 * number + 0.003 * (number % 3)


def write_sweep(path: Path, sweep: Sweep, done: int, failed: int = 0) -> Folder:
    """A sweep's folder, of which some trials have ended and the next ones failed."""
    folder = Folder(path)
    write_description(sweep, folder.description)
    with Store(folder.store) as store:
        for number, trial in enumerate(sweep.trials[: done + failed]):
            record = TrialRecord(
                trial.key,
                trial.name,
                "done",
                trial.settings.seed,
                {},
                "bits: 4",
                {"mean_iou": score(number), "AP": 20.0 + number, "float": {"mean_iou": 0.6}},
                versions={"torch": "2"},
                seconds=12.0,
            )
            if number >= done:
                record = replace(record, status="failed", metrics={}, error="out of memory")
            store.append(record)
    return folder


@pytest.fixture(scope="module")
def bimodal() -> Sweep:
    return read_sweep(BIMODAL)


def test_a_description_is_read_as_it_was_written(tmp_path: Path, bimodal: Sweep) -> None:
    write_description(bimodal, tmp_path / "sweep.json")
    assert read_description(tmp_path / "sweep.json") == bimodal


def test_records_are_found_whatever_extensions_there_are_now(
    tmp_path: Path, bimodal: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_description(bimodal, tmp_path / "sweep.json")
    (tmp_path / "mine.py").write_text("")
    monkeypatch.setenv(EXTENSIONS, str(tmp_path / "mine.py"))
    read = read_description(tmp_path / "sweep.json")
    assert [trial.key for trial in read.trials] == [trial.key for trial in bimodal.trials]


def test_means_and_spreads_over_seeds(tmp_path: Path, bimodal: Sweep) -> None:
    folder = write_sweep(tmp_path, bimodal, len(bimodal.trials))
    page = write_report(folder.path).read_text()
    assert "Sweep bimodal" in page
    assert "has not ended" not in page
    for first in range(0, 12, 3):
        values = [score(first + seed) for seed in range(3)]
        assert f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}" in page
    # One drawing an axis and score, each with four bars, and a bar's error in it.
    labels = re.findall(r'<svg[^>]*aria-label="([^"]*)"', page)
    assert labels == [
        f"{of} by {axis}" for of in ("mean IoU", "mask AP, %") for axis in ("BIG", "AGQ")
    ]
    drawing = page[page.index("<svg") : page.index("</svg>")]
    drawn = re.findall(r">(0\.\d{3})</text>", drawing)
    assert sorted(drawn) == [
        f"{statistics.fmean(score(first + seed) for seed in range(3)):.3f}"
        for first in range(0, 12, 3)
    ]
    assert "float: 0.600" in page


def test_an_unfinished_sweep_with_failures(tmp_path: Path, bimodal: Sweep) -> None:
    folder = write_sweep(tmp_path, bimodal, 5, failed=2)
    page = write_report(folder.path).read_text()
    assert "5 of 12 trials are open" in page
    assert "2 of 12 trials failed" in page
    assert page.count("failed: out of memory") == 2
    assert "5 of 12" in page


def test_a_sweep_that_is_running_can_be_reported(tmp_path: Path, bimodal: Sweep) -> None:
    folder = write_sweep(tmp_path, bimodal, 2)
    with Store(folder.store):
        assert "10 of 12 trials are open" in write_report(folder.path).read_text()


def test_numbers_make_a_curve(tmp_path: Path) -> None:
    sweep = read_sweep(SCHEMES / "sweeps" / "bits.yaml")
    folder = write_sweep(tmp_path, sweep, len(sweep.trials))
    page = write_report(folder.path).read_text()
    assert 'aria-label="mean IoU by bits"' in page


def test_bad_input(tmp_path: Path, bimodal: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    def refusal() -> str:
        assert main(["report", str(tmp_path)]) == 2
        return capsys.readouterr().err

    folder = write_sweep(tmp_path, bimodal, 1)
    described = folder.description.read_text()
    folder.description.write_text(described.replace('"trials"', '"trails"'))
    assert "sweep.json cannot be read" in refusal()
    folder.description.unlink()
    assert "start the sweep again with this work directory" in refusal()
    folder.description.write_text(described)
    folder.store.write_bytes(b"no database at all, but long enough to be looked at")
    assert "sweep.sqlite is damaged" in refusal()


def test_a_sweep_in_a_browser(browser: Browser, tmp_path: Path, bimodal: Sweep) -> None:
    page = write_report(write_sweep(tmp_path, bimodal, 12).path)
    browser.open(page, 390)
    assert browser.run("return document.documentElement.scrollWidth") <= 390
    assert browser.complaints() == []
    assert browser.requests() == [page.resolve().as_uri()]
