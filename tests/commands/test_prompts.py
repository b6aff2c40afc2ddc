"""`ptq4sam prompts`: a detector's boxes as a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptq4sam.cli import main
from tests.tiny_runs import Tiny, read_metrics, run

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
    asked = ["prompts", "--detector", "scene-detector", "--dataset", tiny.annotations()]
    run(*asked, "--out", "same.json")
    assert Path("same.json").read_bytes() == Path("boxes.json").read_bytes()


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ([], "give --dataset or --images"),
        (["--dataset", "coco", "--images", "."], "leave --images and --annotations away"),
    ],
)
def test_prompts_of_no_or_two_data_sets(
    given: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["prompts", "--detector", "scene-detector", "--out", "boxes.json", *given]
    assert main(command) == 2
    assert problem in capsys.readouterr().err
