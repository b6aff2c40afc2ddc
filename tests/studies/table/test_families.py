"""Tables of EfficientViT-SAM and TinySAM: cells, published figures, what lacks, a small one."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from ptq4sam.cli import main
from ptq4sam.errors import ConfigError
from ptq4sam.studies.table import render
from ptq4sam.studies.table.cells import Request
from ptq4sam.studies.table.families import PROMPTING, StudyTable
from ptq4sam.studies.table.published import Figure, Published, published_of_family
from ptq4sam.studies.table.rows import Cell, Row
from ptq4sam.sweep.settings import Pictures
from tests.tiny_runs import Tiny

pytest_plugins = ("tests.tiny_fixtures",)


@pytest.fixture(autouse=True)
def _elsewhere(elsewhere: Path) -> None:
    """A current folder without ckpt/ and data/."""


def _cells(table: str, **asked: object) -> list[Cell]:
    return list(StudyTable(table, Request(**asked)).cells())


# From the tables of the paper and the study, not from the files.
@pytest.mark.parametrize(
    ("cell", "figure", "sizes"),
    [
        (("efficientvit", "coco-truth", "l0", "int8"), "38.6 P", (48.167, 25.984, 43.342)),
        (("efficientvit", "coco-truth", "xl1", "float"), "79.9 P", (83.748, 82.210, 75.833)),
        (("efficientvit", "coco-truth", "xl1", "mix-mbc-neck"), "29.5 P", ()),
        (("efficientvit", "coco-vitdet", "l2", "mix-dwsc"), "32.3 P", (41.5, 36.8, 22.0)),
        (("efficientvit", "coco-vitdet", "xl0", "float"), "47.5 P", ()),
        (("efficientvit", "lvis-truth", "l1", "mix-mbc-neck"), "76.0 P", (87.6, 84.8, 70.5)),
        (("efficientvit", "lvis-vitdet", "xl1", "float"), "44.4 P", ()),
    ],
)
def test_figures_are_the_published_ones(
    cell: tuple[str, str, str, str], figure: str, sizes: tuple[float, ...]
) -> None:
    table, measure, size, method = cell
    found = published_of_family(table, measure, f"efficientvit_sam_{size}", method).figure
    assert found is not None
    assert (str(found), found.sizes) == (figure, sizes)


def test_steps_of_a_table_that_reconstructs_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="asked for 5 steps of reconstruction, but no scheme"):
        _cells("tinysam", steps=5)


def test_figures_of_devices_and_of_older_weights_stand_beside() -> None:
    def also(table: str, measure: str, model: str, method: str) -> str:
        return str(published_of_family(table, measure, model, method).also)

    assert also("efficientvit", "coco-truth", "efficientvit_sam_xl0", "int8") == "53.4 T"
    assert also("efficientvit", "coco-truth", "efficientvit_sam_l0", "float") == "78.4 T"
    assert also("efficientvit", "coco-vitdet", "efficientvit_sam_l1", "mix-dwsc") == "8.2 T"
    assert also("efficientvit", "lvis-truth", "efficientvit_sam_l1", "mix-dwsc") == "None"
    paper = published_of_family("tinysam", "lvis-vitdet", "tinysam", "w8a8")
    assert (str(paper.figure), str(paper.also)) == ("38.5 P", "37.2 R")
    assert str(published_of_family("tinysam", "coco-vitdet", "tinysam", "w6a6").figure) == "39.0 P"
    assert published_of_family("tinysam", "coco-vitdet", "vit_nano", "w6a6") == Published()


def test_every_cell_and_what_it_lacks() -> None:
    cells = _cells("efficientvit", models=["efficientvit_sam_l0"])
    assert len(cells) == 4 * 5
    assert len({cell.name for cell in cells}) == len({cell.settings.key() for cell in cells}) + 4
    lacks = {cell.detector: cell.lacks for cell in cells}
    coco = "efficientvit-sam-l0, coco-val, coco-annotations, coco-calibration"
    assert lacks["coco-truth"] == coco
    assert lacks["coco-vitdet"] == f"{coco}, coco-vitdet"
    lvis = "efficientvit-sam-l0, coco-val, coco-train, lvis-annotations"
    assert lacks["lvis-truth"].startswith(lvis)
    assert lacks["lvis-vitdet"].endswith("lvis-vitdet")
    assert len(_cells("tinysam")) == 4 * 4
    # What is published is what is run.
    settings = cells[-1].settings
    assert (settings.prompting, settings.calibration_prompts) == (PROMPTING, "ground-truth")
    assert (PROMPTING.best_in_multi_mask, PROMPTING.max_per_image) == (True, None)
    assert cells[0].settings.prompts == "ground-truth:all"


def test_megabytes_saved_are_those_that_the_study_prints() -> None:
    cells = _cells(
        "efficientvit",
        models=["efficientvit_sam_l0", "efficientvit_sam_xl1"],
        detectors=["coco-truth"],
    )
    saved = {(c.model[17:], c.method): f"{c.saved:.2f}" for c in cells if c.saved is not None}
    assert saved == {
        **{("l0", "int8"): "29.28", ("l0", "mix-dwsc"): "18.55", ("l0", "mix-mbc-neck"): "6.99"},
        **{("xl1", "int8"): "189.96", ("xl1", "mix-dwsc"): "133.33"},
        ("xl1", "mix-mbc-neck"): "53.77",
        **{("l0", "w8a8"): "29.28", ("xl1", "w8a8"): "189.96"},
    }


def test_filters() -> None:
    cells = _cells("tinysam", detectors=["lvis-vitdet"], bits=[8, 4])
    assert [cell.method for cell in cells] == ["float", "w8a8", "w4a4"]
    with pytest.raises(ConfigError, match="no detector 'coco-vitdt': did you mean 'coco-vitdet'"):
        StudyTable("tinysam", Request(detectors=["coco-vitdt"]))
    with pytest.raises(ConfigError, match="no bits '6': there are 8"):
        StudyTable("efficientvit", Request(bits=[6]))
    with pytest.raises(ConfigError, match="no method 'mix-dws'"):
        StudyTable("efficientvit", Request(methods=["mix-dws"]))


def test_given_pictures_stand_for_those_of_a_measure(tiny: Tiny) -> None:
    given = Pictures(tiny.images(), tiny.annotations())
    asked = Request(models=["efficientvit_sam_l0"], data=given, calibration=given)
    cells = list(StudyTable("efficientvit", asked).cells())
    lacks = {cell.detector: cell.lacks for cell in cells}
    assert lacks["coco-truth"] == "efficientvit-sam-l0"
    assert lacks["lvis-truth"].startswith("efficientvit-sam-l0")
    assert {cell.settings.data for cell in cells} == {given}


@pytest.mark.parametrize("table", ["efficientvit", "tinysam"])
def test_a_dry_run_lists_cells_and_one_command(
    table: str, capsys: pytest.CaptureFixture[str]
) -> None:
    size = ["--models", "efficientvit_sam_l0"] if table == "efficientvit" else []
    assert main(["table", table, "--dry-run", *size]) == 0
    told = capsys.readouterr().out
    model = table if table == "tinysam" else "efficientvit_sam_l0"
    assert f"lvis-vitdet {model}: missing " in told
    assert "0 of them can run" in told
    (command,) = [line for line in told.splitlines() if "ptq4sam download" in line]
    download = "tinysam" if table == "tinysam" else "efficientvit-sam-l0"
    assert {download, "coco-vitdet", "lvis-vitdet", "lvis-annotations"} <= set(command.split())
    assert not Path("work_dirs").exists()
    assert main(["table", table, "--dry-run", "--profile", "nano"]) == 0
    told = capsys.readouterr().out
    assert "\nscenes-truth vit_nano: can run\n  float\n" in told
    assert "mini-truth vit_nano: missing data/coco_mini" in told


def test_the_small_model_needs_nothing_for_scenes(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["table", "efficientvit", "--profile", "nano", "--models", "efficientvit_sam_nano"]
    assert main([*asked, "--detectors", "scenes-truth", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "5 cells, 5 of them can run" in told
    assert "missing" not in told


def test_rows_show_sizes_and_both_figures() -> None:
    cell = _cells("efficientvit", models=["efficientvit_sam_l0"], methods=["int8"])[1]
    cell = replace(cell, missing=())
    row = Row(cell, "done", 40.0, 78.0, sizes=(50.0, 30.0, None))
    ap = replace(cell, metric="AP", published=Published(Figure(5.4, "P")))
    text = render.markdown([row, Row(ap, "done", 6.0, 45.7, sizes=(12.0, 3.0, 2.0))], "T", [])
    header, _, first, second = [line for line in text.splitlines() if line.startswith("|")]
    titles = [title.strip() for title in header.strip("|").split("|")]
    shown = dict(zip(titles, (c.strip() for c in first.strip("|").split("|")), strict=True))
    assert (shown["mean IoU"], shown["AP"], shown["to float"]) == ("40.0", "", "-38.0")
    assert (shown["large"], shown["medium"], shown["small"]) == ("50.0", "30.0", "")
    assert (shown["published"], shown["also"]) == ("38.6 P", "38.6 T")
    assert shown["by size"] == "48.2 / 26.0 / 43.3"
    assert (shown["MB saved"], shown["difference"]) == ("29.28", "+1.4")
    shown = dict(zip(titles, (c.strip() for c in second.strip("|").split("|")), strict=True))
    assert (shown["mean IoU"], shown["AP"], shown["difference"]) == ("", "6.0", "+0.6")
    assert "T: by TensorRT on a device" in text
    (line, _) = csv.DictReader(render.csv_text([row, row]).splitlines())
    assert (line["ap"], line["mean_iou"], line["float_mean_iou"]) == ("", "40.0", "78.0")
    assert (line["large"], line["small"], line["also_mark"]) == ("50.0", "", "T")


def test_a_small_table(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--images", tiny.images(), "--annotations", tiny.annotations()]
    data += ["--calibration-images", tiny.images("train")]
    data += ["--calibration-annotations", tiny.annotations("train")]
    asked = ["table", "efficientvit", "--profile", "nano", "--detectors", "mini-truth"]
    asked += ["--models", "vit_nano", *map(str, data), "--limit", "1", "--calibration-size", "1"]
    assert main([*asked, "--device", "cpu", "--output", "t.csv", "t.md"]) == 0
    with Path("t.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["status"]) for row in rows] == [("float", "done"), ("int8", "done")]
    assert rows[1]["float_mean_iou"] == rows[0]["mean_iou"]
    assert 0 < float(rows[1]["mean_iou"]) <= 100
    told = capsys.readouterr().out
    assert "coco_mini, annotated boxes, vit_nano" in told
    assert "mean IoU: of objects prompted by their annotated boxes" in told
    assert Path("work_dirs/table/efficientvit-nano").is_dir()
    assert "ptq4sam table efficientvit" in Path("t.md").read_text()
