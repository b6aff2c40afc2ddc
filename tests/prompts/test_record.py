from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ptq4sam.data import ImageRecord
from ptq4sam.errors import DataError
from ptq4sam.prompts import Prompts, clean

RECORD = ImageRecord(id=4, path=Path("a.jpg"), width=100, height=50)


def _prompts(count: int) -> Prompts:
    scores = np.linspace(1, 0, count, endpoint=False)
    return Prompts(4, np.tile([0, 0, 9, 9], (count, 1)), scores, np.arange(count))


def test_the_record_has_its_types_whatever_is_given() -> None:
    prompts = Prompts(1, [[0, 1, 2, 3]], [1], [5])  # type: ignore[arg-type]
    assert (prompts.boxes.dtype, prompts.boxes.shape) == (np.float32, (1, 4))
    assert prompts.scores.dtype == np.float32
    assert prompts.category_ids.dtype == np.int64
    assert len(prompts) == 1
    assert Prompts(1, [], [], []).boxes.shape == (0, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("boxes", "scores", "categories"),
    [((4, 5), 4, 4), ((2, 4), 3, 2), ((2, 4), 2, 1), ((4,), 1, 1), ((0, 4), 1, 1)],
)
def test_shapes_that_do_not_belong_together(
    boxes: tuple[int, ...], scores: int, categories: int
) -> None:
    with pytest.raises(DataError, match="image id 7: boxes of shape"):
        Prompts(7, np.zeros(boxes), np.zeros(scores), np.zeros(categories, np.int64))


def test_first_and_above() -> None:
    prompts = _prompts(10)
    assert prompts.first(3).category_ids.tolist() == [0, 1, 2]
    assert len(prompts.first(99)) == 10
    assert prompts.above(0.7).category_ids.tolist() == [0, 1, 2, 3]
    assert len(prompts.above(2)) == 0


def test_cleaning_sorts_stably_and_keeps_the_best() -> None:
    boxes = [[i, 0, i + 5, 5] for i in range(6)]
    cleaned = clean(RECORD, boxes, [0.1, 0.5, 0.9, 0.5, 0.5, 0.2], range(6), limit=4)
    assert cleaned.category_ids.tolist() == [2, 1, 3, 4]
    assert cleaned.boxes[:, 0].tolist() == [2, 1, 3, 4]
    assert cleaned.image_id == 4


def test_boxes_are_cut_off_at_the_border() -> None:
    cleaned = clean(RECORD, [[-10, -5, 20, 20], [90, 40, 900, 51]], [0.9, 0.8], [1, 1])
    assert cleaned.boxes.tolist() == [[0, 0, 20, 20], [90, 40, 100, 50]]


def test_unusable_boxes_are_dropped_with_a_counted_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    nan, inf = float("nan"), float("inf")
    boxes = [
        [0, 0, 10, 10],
        [0, 0, nan, 10],
        [0, 0, inf, 10],
        [5, 5, 5, 10],
        [10, 10, 5, 5],
        [200, 0, 210, 10],
        [0, 0, 10, 10],
    ]
    dropped: Counter[str] = Counter()
    scores = [0.5, 0.9, 0.9, 0.9, 0.9, 0.9, nan]
    cleaned = clean(RECORD, boxes, scores, range(7), dropped=dropped)
    assert cleaned.category_ids.tolist() == [0]
    assert dropped == {"box that is not a number": 3, "box without area in the picture": 3}
    assert [record.getMessage() for record in caplog.records] == [
        "image id 4: dropped 3 x box that is not a number",
        "image id 4: dropped 3 x box without area in the picture",
    ]


def test_nothing_is_said_of_clean_boxes(caplog: pytest.LogCaptureFixture) -> None:
    assert len(clean(RECORD, [[0, 0, 1, 1]], [0.5], [1])) == 1
    assert len(clean(RECORD, [], [], [])) == 0
    assert not caplog.records
