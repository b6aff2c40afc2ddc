"""`ptq4sam prompts`: a detector's boxes as a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptq4sam.cli import main
from tests.tiny_runs import Tiny, read_metrics, refusal, run

pytest_plugins = ("tests.tiny_fixtures",)

# Nothing is written beside the repository.
pytestmark = pytest.mark.usefixtures("elsewhere")


def test_boxes_of_a_detector_are_a_file_like_any_other(tiny: Tiny, tmp_path: Path) -> None:
    run("prompts", "--detector", "scene-detector", *tiny.data(), "--out", "boxes.json")
    asked = ["evaluate", *tiny.model(), *tiny.data()]
    metrics = []
    for spec in ("boxes.json", "scene-detector"):
        run(*asked, "--prompts", spec, "--work-dir", tmp_path / "w")
        metrics.append(read_metrics(tmp_path / "w")["AP"])
    assert metrics[0] == metrics[1]


def test_a_data_set_can_be_named_by_its_annotations(tiny: Tiny) -> None:
    run("prompts", "--detector", "scene-detector", *tiny.data(), "--out", "boxes.json")
    asked = ["prompts", "--detector", "scene-detector", "--images", tiny.annotations()]
    run(*asked, "--output", "same.json")
    assert Path("same.json").read_bytes() == Path("boxes.json").read_bytes()


def test_prompts_of_no_data_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prompts", "--detector", "scene-detector", "--output", "boxes.json"]) == 2
    assert "give --images" in capsys.readouterr().err


def test_boxes_are_written_under_a_name_that_prompts_have(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["prompts", "--detector", "scene-detector", "--images", tiny.images()]
    assert "boxes to b.txt: name it *.json" in refusal(capsys, *asked, "--output", "b.txt")
    assert not Path("b.txt").exists()
