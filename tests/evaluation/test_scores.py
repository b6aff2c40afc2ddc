from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ptq4sam.data import CocoDataset, ImageFolder
from ptq4sam.errors import DataError
from ptq4sam.evaluation import BoxScores, MaskScores, encode_masks, write_json
from ptq4sam.prompts import GroundTruth, Prompts

KEYS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR"]
NO_PIXELS = np.zeros((0, 0, 3), np.uint8)


def _shifted(dataset: CocoDataset, pixels: int, seed: int = 0) -> MaskScores:
    """Scores of the true masks, moved by some pixels, with random scores."""
    scores, truth, rng = MaskScores(dataset), GroundTruth(dataset), np.random.default_rng(seed)
    for record in dataset.images:
        prompts, masks = truth.prompts(record, NO_PIXELS), truth.truth(record)
        moved = np.roll(masks, pixels, axis=(1, 2))
        scores.add(record, moved, rng.random(len(prompts)), prompts.category_ids)
    return scores


def _reference(dataset: CocoDataset, results: list[dict[str, object]], kind: str) -> list[float]:
    """What pycocotools alone says, on the file itself, in percent."""
    truth = COCO(str(dataset.path))
    evaluation = COCOeval(truth, truth.loadRes(json.loads(json.dumps(results))), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return [100 * evaluation.stats[place] for place in (0, 1, 2, 3, 4, 5, 8)]


def test_true_masks_have_full_scores(scenes: CocoDataset) -> None:
    found = _shifted(scenes, 0).summarize()
    assert list(found) == KEYS
    assert [found[key] for key in ("AP", "AP50", "AP75", "AR")] == pytest.approx([100] * 4)


def test_scores_are_those_of_pycocotools(scenes: CocoDataset) -> None:
    scores = _shifted(scenes, 3)
    found = scores.summarize()
    assert 5 < found["AP"] < 90
    expected = _reference(scenes, scores.results, "segm")
    assert list(found.values()) == pytest.approx(expected, abs=1e-9)


def test_box_scores_are_those_of_pycocotools(scenes: CocoDataset) -> None:
    scores, truth, rng = BoxScores(scenes), GroundTruth(scenes), np.random.default_rng(1)
    for record in scenes.images:
        found = truth.prompts(record, NO_PIXELS)
        boxes = found.boxes + rng.normal(0, 2, found.boxes.shape).astype(np.float32)
        scores.add(Prompts(record.id, boxes, rng.random(len(found)), found.category_ids))
    summary = scores.summarize()
    assert 20 < summary["AP"] < 99
    assert list(summary.values()) == pytest.approx(_reference(scenes, scores.results, "bbox"))


def test_pictures_without_masks_count_as_missed(scenes: CocoDataset) -> None:
    every, some = _shifted(scenes, 0), MaskScores(scenes)
    some.results = [result for result in every.results if result["image_id"] <= 3]
    assert 0 < some.summarize()["AR"] < 80


def test_nothing_found_is_zero_and_nothing_to_find_is_no_number(scenes: CocoDataset) -> None:
    found = MaskScores(scenes).summarize()
    assert found["AP"] == found["AR"] == 0
    small = CocoDataset(scenes.images[0].path.parent, scenes.path, limit=1)
    sizes = {
        size: [a for a in (i.area for i in small.instances(small.images[0])) if low <= a < high]
        for size, low, high in (("APs", 0, 32**2), ("APm", 32**2, 96**2), ("APl", 96**2, 1e9))
    }
    summary = MaskScores(small).summarize()
    for key, areas in sizes.items():
        assert math.isnan(summary[key]) == (not areas)
    assert not all(sizes.values())


def test_only_the_pictures_of_the_data_set_count(scenes: CocoDataset) -> None:
    part = CocoDataset(scenes.images[0].path.parent, scenes.path, limit=2)
    assert _shifted(part, 0).summarize()["AR"] == pytest.approx(100)


def test_a_skipped_picture_does_not_count(scenes: CocoDataset, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for record in scenes.images:
        (images / record.path.name).write_bytes(record.path.read_bytes())
    (images / scenes.images[1].path.name).write_bytes(b"damaged")
    dataset = CocoDataset(images, scenes.path, skip_bad=True)
    for record in dataset.images:
        dataset.load_or_skip(record)
    assert len(dataset.images) == len(scenes.images) - 1
    assert _shifted(dataset, 0).summarize()["AR"] == pytest.approx(100)


def test_recall_is_of_up_to_100_masks_of_a_category(scenes: CocoDataset, tmp_path: Path) -> None:
    """With 12 objects of one category a limit of 10, which COCO also has, would leave two out."""
    content = json.loads(scenes.path.read_text())
    content["images"] = content["images"][:1]
    category = content["categories"][0]["id"]
    content["annotations"] = [
        {
            "id": 1 + place,
            "image_id": content["images"][0]["id"],
            "category_id": category,
            "segmentation": [[8 * place, 4, 8 * place + 6, 4, 8 * place + 6, 10, 8 * place, 10]],
            "bbox": [8 * place, 4, 6, 6],
            "area": 36,
            "iscrowd": 0,
        }
        for place in range(12)
    ]
    path = tmp_path / "twelve.json"
    path.write_text(json.dumps(content))
    dataset = CocoDataset(scenes.images[0].path.parent, path)
    assert _shifted(dataset, 0).summarize()["AR"] == pytest.approx(100)


def test_an_annotation_with_id_0_can_be_found(scenes: CocoDataset, tmp_path: Path) -> None:
    """COCOeval takes a match with the object 0 for none, unless ids are renumbered."""
    content = json.loads(scenes.path.read_text())
    content["images"] = content["images"][:1]
    content["annotations"] = [{**content["annotations"][0], "id": 0}]
    path = tmp_path / "from_zero.json"
    path.write_text(json.dumps(content))
    dataset = CocoDataset(scenes.images[0].path.parent, path)
    assert _shifted(dataset, 0).summarize()["AP"] == pytest.approx(100)


def test_crowd_regions_are_neither_found_nor_missed(scenes: CocoDataset, tmp_path: Path) -> None:
    content = json.loads(scenes.path.read_text())
    for annotation in content["annotations"][::2]:
        annotation["iscrowd"] = 1
    path = tmp_path / "crowds.json"
    path.write_text(json.dumps(content))
    dataset = CocoDataset(scenes.images[0].path.parent, path)
    assert _shifted(dataset, 0).summarize()["AR"] == pytest.approx(100)


def test_masks_may_be_given_as_run_lengths(scenes: CocoDataset) -> None:
    record = scenes.images[0]
    masks = GroundTruth(scenes).truth(record)
    first, second = MaskScores(scenes), MaskScores(scenes)
    numbers = np.arange(len(masks))
    first.add(record, masks, numbers / 10, numbers + 1)
    second.add(record, encode_masks(masks), numbers / 10, numbers + 1)
    assert first.results == second.results


def test_results_are_json_and_keep_the_masks(scenes: CocoDataset, tmp_path: Path) -> None:
    scores, record = _shifted(scenes, 2), scenes.images[0]
    write_json(scores.results, tmp_path / "results.json")
    read = json.loads((tmp_path / "results.json").read_text())
    assert read == scores.results
    assert set(read[0]) == {"image_id", "category_id", "segmentation", "score"}
    masks = np.roll(GroundTruth(scenes).truth(record), 2, axis=(1, 2))
    for result, mask in zip(read, masks, strict=False):
        assert np.array_equal(coco_mask.decode(result["segmentation"]).astype(bool), mask)


def test_what_does_not_belong_together_is_refused(scenes: CocoDataset) -> None:
    record, scores = scenes.images[0], MaskScores(scenes)
    masks = np.zeros((2, record.height, record.width), np.bool_)
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        scores.add(record, masks, [0.5], [1, 1])
    with pytest.raises(ValueError, match=r"mask of \[320, 256\] pixels"):
        scores.add(record, masks.transpose(0, 2, 1), [0.5, 0.5], [1, 1])


def test_there_must_be_annotations(scenes: CocoDataset) -> None:
    folder = ImageFolder(scenes.images[0].path.parent)
    scores = MaskScores(folder)
    record = folder.images[0]
    scores.add(record, np.ones((1, record.height, record.width), np.bool_), [1.0], [1])
    assert len(scores.results) == 1
    with pytest.raises(DataError, match="need a data set with annotations"):
        scores.summarize()


def test_nothing_is_printed(scenes: CocoDataset, capsys: pytest.CaptureFixture[str]) -> None:
    _shifted(scenes, 1).summarize()
    assert capsys.readouterr().out == ""
