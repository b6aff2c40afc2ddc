from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from ptq4sam.data import CocoDataset, ImageFolder
from ptq4sam.errors import CalibrationError
from ptq4sam.evaluation.prompting import Prompting
from ptq4sam.families.checkpoint import load_sam
from ptq4sam.prompts import CocoResults, GroundTruth
from ptq4sam.runs.calibration import calibration_pictures
from ptq4sam.sam.model import Sam
from tests.tiny_runs import SMALL, Tiny

pytest_plugins = ("tests.tiny_fixtures",)


@pytest.fixture(scope="module")
def sam(tiny: Tiny) -> Sam:
    return load_sam(SMALL, tiny.checkpoint)


@pytest.fixture
def dataset(tiny: Tiny) -> CocoDataset:
    return CocoDataset(tiny.images("train"), tiny.annotations("train"))


def test_pictures_and_boxes_in_the_models_scale(sam: Sam, dataset: CocoDataset) -> None:
    source = GroundTruth(dataset)
    items = calibration_pictures(sam, dataset, source, 1, Prompting(max_per_image=3))
    assert len(items) == 1
    item = items[0]
    assert item.pixels.shape == (1, 3, 64, 64)
    # Scenes of 320 x 256 pixels become 64 wide.
    record = dataset.images[0]
    boxes = source.prompts(record, dataset.load(record)).boxes[:3]
    height = round(256 * 64 / 320)
    scale = [64 / 320, height / 256] * 2
    np.testing.assert_allclose(item.boxes.numpy(), boxes * scale, rtol=1e-5)


def test_slices_are_sequences_again(sam: Sam, dataset: CocoDataset) -> None:
    items = calibration_pictures(sam, dataset, GroundTruth(dataset), 2, Prompting())
    part = items[1:]
    assert len(part) == 1
    assert np.array_equal(part[0].pixels, items[1].pixels)
    assert not np.array_equal(items[0].pixels, items[1].pixels)


def test_a_seed_draws_the_order(sam: Sam, dataset: CocoDataset) -> None:
    source = GroundTruth(dataset)
    first, second = calibration_pictures(sam, dataset, source, 2, Prompting())
    drawn = {}
    for seed in range(8):
        (one,) = calibration_pictures(sam, dataset, source, 1, Prompting(), seed=seed)
        (again,) = calibration_pictures(sam, dataset, source, 1, Prompting(), seed=seed)
        assert np.array_equal(one.pixels, again.pixels)
        drawn[seed] = np.array_equal(one.pixels, second.pixels)
        assert drawn[seed] or np.array_equal(one.pixels, first.pixels)
    assert set(drawn.values()) == {True, False}


def test_fewer_pictures_than_asked_for(
    sam: Sam, dataset: CocoDataset, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        items = calibration_pictures(sam, dataset, GroundTruth(dataset), 9, Prompting())
    assert len(items) == 2
    assert "2 pictures instead of 9" in caplog.text


def test_no_boxes_at_all(sam: Sam, dataset: CocoDataset) -> None:
    source = GroundTruth(dataset)
    chosen = calibration_pictures(sam, dataset, source, 1, Prompting(score_threshold=1))
    assert len(chosen) == 1
    empty = CocoDataset(dataset.images[0].path.parent, dataset.path)
    empty.images = []
    with pytest.raises(CalibrationError, match="no box"):
        calibration_pictures(sam, empty, source, 1, Prompting())


def test_folder_with_boxes_from_a_file(sam: Sam, tiny: Tiny, tmp_path: Path) -> None:
    folder = ImageFolder(tiny.images("train"))
    boxes = tmp_path / "boxes.json"
    box = {"image_id": 2, "category_id": 1, "bbox": [10, 10, 80, 60], "score": 0.5}
    boxes.write_text(json.dumps([box]))
    items = calibration_pictures(sam, folder, CocoResults(boxes, folder), 2, Prompting())
    assert len(items) == 1
    assert items[0].boxes.shape == (1, 4)


def test_damaged_picture_is_skipped_where_that_is_asked_for(
    sam: Sam, tiny: Tiny, tmp_path: Path
) -> None:
    for path in tiny.images("train").iterdir():
        content = path.read_bytes()
        (tmp_path / path.name).write_bytes(content[:900] if path.stem == "000001" else content)
    dataset = CocoDataset(tmp_path, tiny.annotations("train"), skip_bad=True)
    items = calibration_pictures(sam, dataset, GroundTruth(dataset), 1, Prompting())
    assert len(items) == 1
    assert dataset.skipped == {"damaged image": 1}
