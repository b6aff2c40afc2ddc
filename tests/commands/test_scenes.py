"""`ptq4sam scenes`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ptq4sam.data import CocoDataset
from tests.tiny_runs import refusal, run

pytest_plugins = ("tests.tiny_fixtures",)

# Nothing is written beside the repository.
pytestmark = pytest.mark.usefixtures("elsewhere")


def test_scenes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("scenes", "a", "--train", 1, "--val", 2)
    train = CocoDataset(tmp_path / "a/images/train", tmp_path / "a/annotations/train.json")
    val = CocoDataset(tmp_path / "a/images/val", tmp_path / "a/annotations/val.json")
    assert (len(train.images), len(val.images)) == (1, 2)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "1 scenes in a/images/train, annotations a/annotations/train.json"
    assert said[1].startswith("2 scenes in a/images/val")
    assert not np.array_equal(train.load(train.images[0]), val.load(val.images[0]))
    assert "at least one scene" in refusal(capsys, "scenes", "b", "--train", 0)


def test_no_scenes_are_refused_before_any_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refusal(capsys, "scenes", tmp_path / "s", "--train", 2, "--val", -1)
    assert "needs at least one scene, -1 were asked for" in told
    assert not (tmp_path / "s").exists()
