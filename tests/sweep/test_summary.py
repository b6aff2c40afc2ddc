"""Tables of a sweep: what their columns and lines say."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console, ConsoleDimensions

from ptq4sam.sweep.grid import Sweep, Trial
from ptq4sam.sweep.live import picture
from ptq4sam.sweep.scheduler import State
from ptq4sam.sweep.store import TrialRecord
from ptq4sam.sweep.summary import Row, float_lines, table
from tests.sweep.fake_workers import SETTINGS


def row(metrics: dict[str, Any]) -> Row:
    record = TrialRecord("k", "bits=4", "done", 0, {}, "", metrics=metrics, seconds=2.0)
    return Row(Trial({"bits": 4}, SETTINGS, "k"), record)


@pytest.mark.parametrize(
    ("scores", "floats", "title", "change"),
    [
        ({"AP": 40.0, "mean_iou": 0.5}, {"AP": 50.0, "mean_iou": 0.6}, "IoU change", "-10.0"),
        ({"AP": 40.0}, {"AP": 50.0}, "AP change", "-10.0"),
        ({"AP": 40.0, "mean_iou": 0.5}, {"AP": 41.0, "mean_iou": None}, "AP change", "-1.0"),
    ],
)
def test_the_change_says_of_which_score_it_is(
    scores: dict[str, Any], floats: dict[str, Any], title: str, change: str
) -> None:
    found = row({**scores, "float": floats})
    titles, cells = table(Sweep("s", (found.trial,)), [found])
    assert dict(zip(titles, cells, strict=True))[title] == change


def test_scores_that_are_no_numbers_are_left_out() -> None:
    floats = {"AP": 50.0, "APl": None, "AR": 60.0}
    assert float_lines([row({"AP": 40.0, "float": floats})]) == [
        f"float {SETTINGS.model}: AP 50.0, AR 60.0"
    ]


def test_how_far_a_sweep_is_has_a_line_of_its_own() -> None:
    found = row({"AP": 40.0})
    assert found.record is not None
    state = State([], {"k": found.record})
    console = Console(file=io.StringIO(), width=80)
    sweep = Sweep("s", (found.trial,))
    console.print(picture(sweep, state, 1, 125.0, ConsoleDimensions(80, 40)))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[-1].startswith("1 of 1 trials, 2 min so far")
    assert max(map(len, lines)) <= 80
