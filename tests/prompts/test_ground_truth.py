from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ptq4sam.data import CocoDataset, ImageFolder
from ptq4sam.errors import DataError
from ptq4sam.prompts import GroundTruth, open_prompts

NO_PIXELS = np.zeros((0, 0, 3), np.uint8)


def test_boxes_and_masks_are_those_of_the_annotations(scenes: CocoDataset) -> None:
    source = GroundTruth(scenes)
    for record in scenes.images:
        items = scenes.instances(record)
        prompts, truth = source.prompts(record, NO_PIXELS), source.truth(record)
        assert prompts.image_id == record.id
        assert prompts.boxes.tolist() == [item.box.tolist() for item in items]
        assert prompts.category_ids.tolist() == [item.category_id for item in items]
        assert set(prompts.scores.tolist()) == {1.0}
        assert truth.dtype == np.bool_
        assert all(np.array_equal(m, item.mask) for m, item in zip(truth, items, strict=True))


def test_crowds_and_empty_boxes_never_prompt(scenes: CocoDataset, tmp_path: Path) -> None:
    content = json.loads(scenes.path.read_text())
    first = [a for a in content["annotations"] if a["image_id"] == 1]
    first[0]["iscrowd"] = 1
    first[2]["bbox"][2] = 0
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(content))
    dataset = CocoDataset(scenes.images[0].path.parent, changed)
    source, record = GroundTruth(dataset), dataset.images[0]
    kept = [item for i, item in enumerate(dataset.instances(record)) if i not in (0, 2)]
    prompts, truth = source.prompts(record, NO_PIXELS), source.truth(record)
    assert len(prompts) == len(truth) == len(first) - 2
    assert prompts.boxes.tolist() == [item.box.tolist() for item in kept]
    assert all(np.array_equal(m, item.mask) for m, item in zip(truth, kept, strict=True))


def test_all_annotations_are_crowds_too_but_nothing_below_a_pixel(
    scenes: CocoDataset, tmp_path: Path
) -> None:
    content = json.loads(scenes.path.read_text())
    first = [a for a in content["annotations"] if a["image_id"] == 1]
    mask = np.zeros((256, 320), np.bool_)
    mask[2:5, 1:3] = True
    # Run lengths go down the columns: 258 pixels before, 3 in each of two columns.
    counts = [256 + 2, 3, 253, 3, 256 * 320 - 258 - 3 - 253 - 3]
    first[0] |= {"iscrowd": 1, "segmentation": {"size": [256, 320], "counts": counts}}
    first[0] |= {"bbox": [1, 2, 2, 3], "area": 6}
    first[1]["area"] = 0.99
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(content))
    dataset = CocoDataset(scenes.images[0].path.parent, changed)
    record = dataset.images[0]
    source, without = open_prompts("ground-truth:all", dataset), GroundTruth(dataset)
    assert isinstance(source, GroundTruth)
    assert source.areas(record) == [6, *(a["area"] for a in first[2:])]
    assert without.areas(record) == [a["area"] for a in first[1:]]
    assert len(source.prompts(record, NO_PIXELS)) == len(first) - 1
    np.testing.assert_array_equal(source.truth(record)[0], mask)
    assert source.fingerprint() != without.fingerprint()


def test_a_picture_without_objects_has_no_prompts(scenes: CocoDataset, tmp_path: Path) -> None:
    content = json.loads(scenes.path.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 2]
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(content))
    dataset = CocoDataset(scenes.images[0].path.parent, changed)
    source = GroundTruth(dataset)
    assert len(source.prompts(dataset.images[1], NO_PIXELS)) == 0
    assert source.truth(dataset.images[1]).shape == (0, 256, 320)


def test_there_must_be_annotations(scenes: CocoDataset) -> None:
    with pytest.raises(DataError, match="need a data set with annotations"):
        GroundTruth(ImageFolder(scenes.images[0].path.parent))
