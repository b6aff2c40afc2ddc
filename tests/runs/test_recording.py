from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ptq4sam.data import ImageRecord
from ptq4sam.evaluation.evaluate import Picture
from ptq4sam.evaluation.segmentation import Segmented
from ptq4sam.prompts import Prompts
from ptq4sam.runs import recording
from ptq4sam.runs.recording import PictureRecorder


def picture(
    number: int, agreement: list[float], scores: list[float] | None = None, side: int = 80
) -> Picture:
    count = len(agreement)
    exact, found = np.zeros((2, count, side, 2 * side), bool)
    exact[:, 10:40, 20:60] = True
    found[:, 10:40, 40:80] = True
    scored = np.array(scores or [0.9] * count, np.float32)
    boxes = np.tile(np.array([[20, 10, 60, 40]], np.float32), (count, 1))
    record = ImageRecord(number, Path(f"{number}.jpg"), 2 * side, side)
    image = np.full((side, 2 * side, 3), 90, np.uint8)
    return Picture(
        record,
        image,
        Prompts(number, boxes, scored, np.ones(count, np.int64)),
        Segmented(found, scored, scored, np.zeros((len(found), 1, 1), np.float32)),
        Segmented(exact, scored, scored, np.zeros((len(exact), 1, 1), np.float32)),
        agreement,
    )


def decoded(uri: str) -> np.ndarray:
    kind, _, content = uri.partition(";base64,")
    assert kind.startswith("data:image/")
    with Image.open(io.BytesIO(base64.b64decode(content))) as opened:
        return np.asarray(opened.convert("RGBA"))


def test_the_worst_pictures_are_kept_worst_first() -> None:
    recorder = PictureRecorder(most=3)
    agreements = [0.9, 0.2, 0.7, 0.4, 0.95, 0.1, 0.8]
    for number, agreement in enumerate(agreements):
        recorder(picture(number, [agreement]))
    assert [one.score.agreement for one in recorder.worst()] == [0.1, 0.2, 0.4]
    assert [score.agreement for score in recorder.scores()] == agreements


def test_masks_with_low_scores_do_not_count_unless_all_are_low() -> None:
    recorder = PictureRecorder(threshold=0.3)
    recorder(picture(0, [0.5, 0.1], [0.9, 0.05]))
    recorder(picture(1, [0.5, 0.1], [0.1, 0.05]))
    first, second = recorder.scores()
    assert (first.masks, first.agreement) == (1, 0.5)
    assert (second.masks, second.agreement) == (2, pytest.approx(0.3))


def test_layers_show_each_models_masks_and_where_they_differ() -> None:
    recorder = PictureRecorder()
    recorder(picture(0, [0.33]))
    (kept,) = recorder.worst()
    assert (kept.width, kept.height) == (160, 80)
    assert kept.reference is not None
    assert kept.difference is not None
    opaque = decoded(kept.reference)[..., 3] > 0
    assert opaque[25, 30]
    assert not opaque[25, 70]
    assert not opaque[60, 100]
    assert decoded(kept.quantized)[25, 70, 3] > 0
    difference = decoded(kept.difference)
    lost, both, gained = difference[25, 30], difference[25, 50], difference[25, 70]
    assert lost[0] > 200 > lost[2]
    assert gained[2] > 200 > gained[0]
    assert both[0] == both[1] == both[2]
    assert difference[60, 100, 3] == 0


def test_large_pictures_are_made_smaller() -> None:
    recorder = PictureRecorder()
    recorder(picture(0, [0.5], side=700))
    (kept,) = recorder.worst()
    assert (kept.width, kept.height) == (recording.LONGEST_SIDE, recording.LONGEST_SIDE // 2)
    assert decoded(kept.image).shape == decoded(kept.quantized).shape


def test_no_more_pictures_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = PictureRecorder()
    for number in range(5):
        recorder(picture(number, [0.1 * number]))
    parts = recorder.worst()[0]
    size = sum(
        len(part or "")
        for part in (parts.image, parts.quantized, parts.reference, parts.difference)
    )
    monkeypatch.setattr(recording, "MOST_BYTES", 2 * size + 10)
    assert [one.score.id for one in recorder.worst()] == [0, 1]
