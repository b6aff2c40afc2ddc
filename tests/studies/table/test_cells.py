"""`ptq4sam table`: its cells, what they miss, and a whole small table."""

from __future__ import annotations

import csv
import sqlite3
from pathlib import Path

import pytest

from ptq4sam.cli import main
from ptq4sam.errors import ConfigError
from ptq4sam.studies.table.cells import Request, Table
from ptq4sam.studies.table.rows import sweep_of
from tests.tiny_runs import REPOSITORY, Tiny

pytest_plugins = ("tests.tiny_fixtures",)


@pytest.fixture(autouse=True)
def _elsewhere(elsewhere: Path) -> None:
    """A current folder without ckpt/ and data/."""


def test_the_table_has_every_cell() -> None:
    cells = list(Table(Request()).cells())
    assert len(cells) == 4 * 3 * (1 + 2 * 12)
    assert len({cell.name for cell in cells}) == len(cells)
    assert all(cell.missing for cell in cells)
    nano = list(Table(Request("nano")).cells())
    assert len(nano) == 2 * (1 + 2 * 12)
    assert {cell.detector for cell in nano if not cell.missing} == {"scenes"}


def test_cells_name_the_downloads_that_they_lack() -> None:
    asked = Request(detectors=["hdetr"], models=["vit_l"], bits=[4], methods=["qdrop"])
    float_cell, cell = Table(asked).cells()
    lacks = ["hdetr-r50", "sam-vit-l", "coco-val", "coco-annotations", "coco-calibration"]
    assert float_cell.lacks == cell.lacks == ", ".join(lacks)
    assert (cell.name, float_cell.name) == ("hdetr vit_l qdrop W4A4", "hdetr vit_l float")


def test_what_is_there_is_not_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (
        "ckpt/yolox_l.pth",
        "ckpt/sam_vit_b_01ec64.pth",
        "data/coco/annotations/instances_val2017.json",
        "data/coco/annotations/instances_train2017.json",
        "data/coco/val2017/x",
        "data/coco/train2017/x",
    ):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).touch()
    asked = Request(
        detectors=["yolox"], models=["vit_b", "vit_l"], methods=["minmax", "brecq"], steps=7
    )
    cells = list(Table(asked).cells())
    assert {cell.lacks for cell in cells if cell.model == "vit_l"} == {"sam-vit-l"}
    present = [cell for cell in cells if not cell.missing]
    assert {cell.boxes for cell in present} == {"YOLOX-L, its authors' weights"}
    sweep, floats = sweep_of("t", cells)
    assert [trial.name for trial in sweep.trials][:2] == [
        "detector=yolox, model=vit_b, bits=W6A6, method=minmax",
        "detector=yolox, model=vit_b, bits=W6A6, method=brecq",
    ]
    assert len(floats) == 1
    settings = sweep.trials[1].settings
    assert (settings.prompts, settings.model) == ("yolox:ckpt/yolox_l.pth", "vit_b")
    assert (settings.prompting.score_threshold, settings.limit) == (0.05, None)
    assert settings.scheme.recon is not None
    assert settings.scheme.recon.iters == 7


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        (Request("nanno"), "no profile 'nanno': did you mean 'nano'"),
        (Request(detectors=["yolo"]), "no detector 'yolo': did you mean 'yolox'"),
        (Request(models=["vitb"]), "no model 'vitb': did you mean 'vit_b'"),
        (Request(methods=["ptq4sam"]), "no method 'ptq4sam': did you mean 'ptq4sam-[sl]'"),
        (Request(methods=["ptq4samL"]), "no method 'ptq4samL': did you mean 'ptq4sam-l'"),
        (Request(methods=["PTQ4SAM_S"]), "no method 'PTQ4SAM_S': did you mean 'ptq4sam-s'"),
        (Request(bits=[8]), "no bits '8': there are 6, 4"),
    ],
)
def test_unknown_filters_name_the_nearest(asked: Request, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        Table(asked)


def test_every_row_is_printed_and_nothing_is_repeated(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    # Two pictures to calibrate on, and annotated boxes: YOLOX-Nano is not in ckpt/.
    data = ["--images", tiny.images(), "--annotations", tiny.annotations()]
    data += ["--calibration-images", tiny.images("train")]
    data += ["--calibration-annotations", tiny.annotations("train")]
    asked = ["table", "coco", "--profile", "nano", "--detectors", "coco-mini", *map(str, data)]
    asked += ["--methods", "minmax", "percentile", "--bits", "4", "--limit", "1"]
    asked += ["--calibration-size", "1", "--decoder-only", "--device", "cpu"]
    asked += ["--out", "t.csv", "t.md"]
    assert main(asked) == 0
    capsys.readouterr()
    with Path("t.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["status"]) for row in rows] == [
        ("float", "done"),
        ("minmax", "done"),
        ("percentile", "done"),
    ]
    assert {row["boxes"] for row in rows} == {"annotated boxes, coco_mini"}
    assert {row["float_ap"] for row in rows} == {rows[0]["ap"]}

    assert main(asked) == 0
    told = capsys.readouterr().out
    assert main(["report", "work_dirs/table/nano"]) == 0
    page = Path("work_dirs/table/nano/report.html").read_text()
    assert "2 of 2" in page
    assert "percentile" in page
    assert "MinMax" in told
    assert "Percentile" in told
    connection = sqlite3.connect("work_dirs/table/nano/sweep.sqlite")
    assert connection.execute("SELECT count(*) FROM trials").fetchone() == (2,)
    connection.close()


def test_a_failed_cell_shows_its_error(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    # The annotations are another data set's: its pictures are not in the folder.
    data = ["--images", tiny.images("train"), "--annotations", tiny.annotations()]
    data += ["--calibration-images", tiny.images("train")]
    data += ["--calibration-annotations", tiny.annotations("train")]
    asked = ["table", "coco", "--profile", "nano", "--detectors", "coco-mini", *map(str, data)]
    asked += ["--methods", "minmax", "--bits", "4", "--device", "cpu", "--out", "t.csv"]
    assert main(asked) == 1
    with Path("t.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["failed", "failed"]
    assert all(row["problem"] for row in rows)
    assert "failed" in capsys.readouterr().out


def test_mistakes_are_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: str) -> str:
        assert main(["table", *arguments]) == 2
        return " ".join(capsys.readouterr().err.split())

    assert "no name 'cocoa': did you mean 'coco'" in refused("cocoa")
    assert "use 1 or more" in refused("coco", "--jobs", "0")
    assert "name it *.md" in refused("coco", "--out", "t.xls")
    assert "for --profile nano" in refused("coco", "--coco-mini", "x")
    # Scenes alone would be scored.
    told = refused("coco", "--profile", "nano", "--coco-mini", "no")
    assert "--coco-mini no: no/images/val2017, which is not there" in " ".join(told.split())
    told = refused("coco", "--images", "no", "--annotations", "no.json")
    assert "asked for --images no, which is not there" in told


def test_a_table_of_which_nothing_can_run_fails(capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--methods", "minmax", "--bits", "4"]
    assert main(["table", "coco", "--detectors", "hdetr", "--models", "vit_b", *few]) == 1
    told = capsys.readouterr().out
    assert "missing: ptq4sam download hdetr-r50 sam-vit-b coco-val" in told
    assert told.endswith("no cell can run: get what is missing, or choose others\n")
    asked = ["table", "coco", "--profile", "nano", "--detectors", "coco-mini", *few]
    assert main(asked) == 1
    told = capsys.readouterr().out
    assert told.count("is not there") == 1
    assert "data/coco_mini is not there\ngive --coco-mini DIR, or --images" in told


def test_a_dry_run_lists_cells_and_downloads(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", "coco", "--dry-run", "--detectors", "dino", "--bits", "6"]) == 0
    told = capsys.readouterr().out
    assert "dino vit_h: missing focalnet-dino-l, sam-vit-h, coco-val" in told
    rows = [line for line in told.splitlines() if line.startswith("  W6A6: ")]
    assert [line.count(",") + 1 for line in rows] == [12, 12, 12]
    assert all("minmax, percentile" in line for line in rows)
    assert told.count("  float\n") == 3
    assert "39 cells, 0 of them can run" in told
    assert "missing: ptq4sam download focalnet-dino-l sam-vit-b" in told
    assert not Path("work_dirs").exists()


def test_configurations_and_schemes_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert next(iter(Table(Request()).cells())).settings.scheme.calibrate == 32
    with pytest.raises(ConfigError, match="no such"):
        list(Table(Request(), root=tmp_path).cells())
    assert REPOSITORY.name
