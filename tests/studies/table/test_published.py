"""The published figures, and how rows are compared and shown."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from ptq4sam.errors import ConfigError
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.studies.table import render
from ptq4sam.studies.table.published import METHODS, Figure, Published, published
from ptq4sam.studies.table.rows import Cell, MissingInput, Row, comparisons
from ptq4sam.sweep.settings import TrialSettings
from tests.tiny_runs import SCHEMES

SETTINGS = TrialSettings(scheme=Scheme.from_yaml(SCHEMES / "minmax66.yaml"))
CELL = Cell(
    "yolox",
    "YOLOX-L, 100% & more",
    "vit_b",
    4,
    "ptq4sam-l",
    SETTINGS,
    published("yolox", "vit_b", 4, "ptq4sam-l"),
)
ROWS = [
    Row(replace(CELL, bits=None, method="float", published=Published()), "done", 37.0, 37.0),
    Row(CELL, "done", 5.25, 37.0, 12.3, versions="torch 2"),
    Row(
        replace(CELL, method="qdrop", published=Published(Figure(None, "M"))),
        "failed",
        problem="no | memory",
    ),
    Row(
        replace(CELL, missing=(MissingInput("a.pth", "sam-vit-b"),)), "missing", problem="sam-vit-b"
    ),
]


# From the tables themselves, not from the file.
@pytest.mark.parametrize(
    ("cell", "figure"),
    [
        (("faster-rcnn", "vit_l", None, "float"), "36.4 S"),
        (("hdetr", "vit_h", None, "float"), "42.0 M"),
        (("dino", "vit_b", 4, "ptq4sam-l"), "14.4 S"),
        (("dino", "vit_l", 6, "qdrop"), "47.5 S"),
        (("yolox", "vit_h", 4, "omse"), "7.8 M"),
        (("yolox", "vit_b", 4, "adaround"), "- M"),
        (("faster-rcnn", "vit_l", 6, "minmax"), "32.9 S"),
        (("faster-rcnn", "vit_b", 6, "brecq"), "24.1 M"),
        (("dino", "vit_b", 4, "saq-sam"), "3.5 S"),
        (("dino", "vit_h", 6, "saq-sam"), "48.2 S"),
        (("dino", "vit_l", 4, "ahcptq"), "36.6 P"),
        (("yolox", "vit_b", 4, "ahcptq"), "13.4 S"),
        (("faster-rcnn", "vit_b", 4, "ahcq-sam"), "17.9 S"),
    ],
)
def test_figures(cell: tuple[str, str, int | None, str], figure: str) -> None:
    assert str(published(*cell).figure) == figure


def test_what_no_paper_has() -> None:
    assert published("hdetr", "vit_b", 4, "qdrop") == Published()
    assert published("dino", "vit_b", 6, "omse") == Published()
    assert published("yolox", "vit_l", 4, "car-sam") == Published()
    assert published("dino", "vit_b", 4, "ahcptq") == Published()
    assert published("scenes", "vit_nano", 4, "qdrop") == Published()


def test_only_rows_with_reconstruction_of_activations_are_inflated() -> None:
    inflated = {m for m in METHODS if published("yolox", "vit_l", 6, m).inflated}
    assert inflated == {"qdrop", "ptq4sam-l"}


def test_a_corrected_figure_goes_before_the_published_one() -> None:
    known = published("yolox", "vit_b", 4, "ptq4sam-l")
    assert (str(known.figure), str(known.corrected), known.inflated) == ("18.4 S", "3.8 S", True)
    assert ROWS[1].difference == pytest.approx(5.25 - 3.8)
    assert ROWS[1].change == pytest.approx(5.25 - 37.0)
    other = replace(CELL, published=published("yolox", "vit_l", 4, "ptq4sam-l"))
    assert Row(other, "done", 30.0, 37.0).difference == pytest.approx(30.0 - 31.6)
    assert ROWS[2].difference is None


def test_methods_are_compared_by_the_same_pictures() -> None:
    scores = {str(n): (0.5 + 0.01 * (n % 7), 1 + n % 3) for n in range(40)}
    better = {key: (mean + 0.1, count) for key, (mean, count) in scores.items() if key != "3"}
    nothing = {key: (mean, count) for key, (mean, count) in better.items()}
    rows = [
        Row(replace(CELL, method=method), "done", 5.0, 37.0, by_picture=found)
        for method, found in (
            ("minmax", scores),
            ("omse", {}),
            ("ptq4sam-s", better),
            ("ptq4sam-l", nothing),
        )
    ]
    block = "YOLOX-L, 100% & more vit_b W4A4, agreement of"
    compared = list(comparisons([*rows, replace(rows[0], cell=replace(CELL, bits=6))]))
    assert compared == [
        f"{block} PTQ4SAM-S against MinMax: +10.0 (95%: +10.0 to +10.0): a difference.",
        f"{block} PTQ4SAM-L against PTQ4SAM-S: +0.0 (95%: +0.0 to +0.0): no difference beyond "
        "the choice of pictures.",
    ]
    assert render.legend(rows)[-2:] == compared
    assert list(comparisons(ROWS)) == []


def test_every_form_shows_the_same_rows(tmp_path: Path) -> None:
    for ending in ("md", "csv", "tex"):
        render.write(tmp_path / f"t.{ending}", ROWS, "Title", ["a note"])
    page = (tmp_path / "t.md").read_text()
    line = (
        "| YOLOX-L, 100% & more | vit_b | W4A4 | PTQ4SAM-L | 5.2 | -31.8 | 18.4 S* | 3.8 S | +1.5"
    )
    assert line in page
    assert "failed: no \\| memory" in page
    assert "missing: sam-vit-b" in page
    rows = list(csv.DictReader(io.StringIO((tmp_path / "t.csv").read_text())))
    assert [row["status"] for row in rows] == ["done", "done", "failed", "missing"]
    assert (rows[1]["ap"], rows[1]["corrected"], rows[1]["inflated"]) == ("5.25", "3.8", "True")
    tex = (tmp_path / "t.tex").read_text()
    body = tex.split(r"\endhead")[1].split(r"\bottomrule")[0]
    assert body.count(r"\\") == len(ROWS)
    assert r"YOLOX-L, 100\% \& more & vit\_b & W4A4 & PTQ4SAM-L & 5.2 &" in body
    console = Console(file=io.StringIO(), width=200)
    console.print(render.terminal(ROWS))
    assert "18.4 S*" in console.file.getvalue()  # type: ignore[attr-defined]


def test_on_a_narrow_terminal_every_number_is_whole() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(render.terminal(ROWS, 80))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 80
    (line,) = [line for line in lines if "done" in line and "W4A4" in line]
    assert " ".join(line.split()) == "W4A4 PTQ4SAM-L 5.2 -31.8 18.4 S* 3.8 S +1.5 12 done"
    assert "  failed: no | memory" in lines
    assert lines.count("YOLOX-L, 100% & more, vit_b") == 1


def test_what_cells_lack_is_told_once_a_heading_and_errors_always() -> None:
    failed, missing = ROWS[2:]
    other = replace(missing, cell=replace(missing.cell, model="vit_l"))
    console = Console(file=io.StringIO(), width=80)
    console.print(render.terminal([missing, failed, failed, missing, other], 80))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    told = [line.strip() for line in lines if line.startswith("  ")]
    lacks, error = "missing: sam-vit-b", "failed: no | memory"
    assert told[-4:] == [lacks, error, error, lacks]
    assert told.count(lacks) == 2


def test_a_form_that_is_not_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"name it \*\.md, \*\.csv or \*\.tex"):
        render.write(tmp_path / "t.html", ROWS, "Title", [])


def test_one_command_gets_all_that_is_missing() -> None:
    missing = [
        MissingInput("a", "sam-vit-b"),
        MissingInput("b", "coco-val"),
        MissingInput("a", "sam-vit-b"),
    ]
    library = MissingInput("mmdetection", remedy="needs mmdetection: ./environment.sh mmdet")
    assert render.how_to_get([*missing, library, MissingInput("data/x")]) == [
        "missing: ptq4sam download sam-vit-b coco-val",
        "missing: needs mmdetection: ./environment.sh mmdet",
        "missing: data/x is not there: name another",
    ]
