from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ptq4sam.data import CocoDataset, ImageRecord
from ptq4sam.errors import DataError
from ptq4sam.prompts import (
    CocoResults,
    GroundTruth,
    Prompts,
    cached,
    clean,
    open_prompts,
    to_results,
    write_results,
)
from ptq4sam.runs.detecting import write_boxes

NO_PIXELS = np.zeros((0, 0, 3), np.uint8)


def _result(image_id: object = 1, **more: Any) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": 1, "bbox": [10, 20, 30, 40], "score": 0.5, **more}


def _write(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(content))
    return path


def test_boxes_are_read_as_corners_best_first(tmp_path: Path, scenes: CocoDataset) -> None:
    entries = [_result(score=0.2), _result(2), _result(score=0.9, category_id=4, bbox=[0, 0, 5, 6])]
    source = CocoResults(_write(tmp_path, entries), scenes)
    found = source.prompts(scenes.images[0], NO_PIXELS)
    assert found.boxes.tolist() == [[0, 0, 5, 6], [10, 20, 40, 60]]
    assert np.allclose(found.scores, [0.9, 0.2])
    assert found.category_ids.tolist() == [4, 1]
    assert len(source.prompts(scenes.images[1], NO_PIXELS)) == 1
    assert len(source.prompts(scenes.images[2], NO_PIXELS)) == 0


def test_pictures_that_a_file_does_not_name_are_counted(
    tmp_path: Path, scenes: CocoDataset, caplog: pytest.LogCaptureFixture
) -> None:
    CocoResults(_write(tmp_path, [_result(record.id) for record in scenes.images]), scenes)
    assert not caplog.records
    CocoResults(_write(tmp_path, [_result()]), scenes)
    count = len(scenes.images)
    assert f"has no boxes for {count - 1} of {count} pictures" in caplog.text


def test_only_the_best_are_used(tmp_path: Path, scenes: CocoDataset) -> None:
    path = _write(tmp_path, [_result(score=i / 200) for i in range(150)])
    found = CocoResults(path, scenes, limit=100).prompts(scenes.images[0], NO_PIXELS)
    assert len(found) == 100
    assert found.scores.min() == pytest.approx(0.25)
    everything = CocoResults(path, scenes)
    assert len(everything.prompts(scenes.images[0], NO_PIXELS)) == 150
    assert everything.fingerprint() != CocoResults(path, scenes, 100).fingerprint()


def test_numbers_that_are_none_are_dropped_and_counted(tmp_path: Path, scenes: CocoDataset) -> None:
    entries = [_result(), _result(score=float("nan")), _result(bbox=[1, 2, 0, 3])]
    source = CocoResults(_write(tmp_path, entries), scenes)
    assert len(source.prompts(scenes.images[0], NO_PIXELS)) == 1
    assert source.dropped == {"box that is not a number": 1, "box without area in the picture": 1}


def test_numbers_that_are_none_are_told_in_one_line(
    tmp_path: Path, scenes: CocoDataset, caplog: pytest.LogCaptureFixture
) -> None:
    entries = [_result(record.id, score=float("nan")) for record in scenes.images for _ in range(9)]
    CocoResults(
        _write(tmp_path, [_result(record.id) for record in scenes.images] + entries), scenes
    )
    (told,) = [record.getMessage() for record in caplog.records]
    assert "boxes.json: dropped 27 x box that is not a number" in told


def test_a_result_without_a_score_has_1_with_a_note(
    tmp_path: Path, scenes: CocoDataset, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    entries = [_result(record.id) for record in scenes.images]
    del entries[0]["score"]
    entries[1]["score"] = None
    source = CocoResults(_write(tmp_path, entries), scenes)
    scores = [source.prompts(record, NO_PIXELS).scores.tolist() for record in scenes.images]
    assert scores == [[1.0], [1.0], [0.5]]
    (told,) = caplog.records
    assert "boxes.json: 2 of 3 results have no score: each counts as 1" in told.getMessage()
    assert told.levelname == "INFO"


def test_whole_numbers_may_be_written_otherwise(
    tmp_path: Path, scenes: CocoDataset, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    entries = [_result(), _result("2"), _result(3.0, category_id="4")]
    source = CocoResults(_write(tmp_path, entries), scenes)
    found = [source.prompts(record, NO_PIXELS).category_ids.tolist() for record in scenes.images]
    assert found == [[1], [1], [4]]
    (told,) = [record.getMessage() for record in caplog.records]
    assert 'numbers are written as text, as "2"' in told


def test_a_file_compressed_by_gzip(tmp_path: Path, scenes: CocoDataset) -> None:
    path = tmp_path / "boxes.json.gz"
    path.write_bytes(gzip.compress(json.dumps([_result()]).encode()))
    source = open_prompts(str(path), scenes)
    assert isinstance(source, CocoResults)
    assert len(source.prompts(scenes.images[0], NO_PIXELS)) == 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda x, y, w, h: [x, y, x + w, y + h], "are they [x1, y1, x2, y2] (xyxy)"),
        (lambda x, y, w, h: [x / 320, y / 256, w / 320, h / 256], "boxes lie within one pixel"),
        (lambda x, y, w, h: [4 * x, 4 * y, 4 * w, 4 * h], "of pictures of another size"),
        (lambda x, y, w, h: [x + w / 2, y + h / 2, w, h], "fit as [centre x, centre y, width,"),
        (lambda x, y, w, h: [x / 3.2, y / 2.56, w / 3.2, h / 2.56], "fit as percent [x, y, "),
        (
            lambda x, y, w, h: [x / 0.32, y / 0.256, (x + w) / 0.32, (y + h) / 0.256],
            "fit as thousandths [x1, y1, x2, y2] (xyxy)",
        ),
        (lambda x, y, w, h: [y, x, h, w], "fit as [y, x, height, width]"),
        (lambda x, y, w, h: [y, x, y + h, x + w], "fit as [y1, x1, y2, x2]"),
        (lambda x, y, w, h: [x / 2, y / 2, w / 2, h / 2], "are they of these pictures in this"),
        (lambda x, y, w, h: [x, y, w, h], None),
        (lambda x, y, w, h: [x + w / 8, y, w, h], None),
    ],
)
def test_boxes_that_are_no_sizes_in_pixels_are_noticed(
    tmp_path: Path,
    scenes: CocoDataset,
    caplog: pytest.LogCaptureFixture,
    change: Callable[..., list[float]],
    told: str | None,
) -> None:
    """Of the annotated boxes of the scenes, written otherwise; the boxes themselves stay so."""
    entries = [
        {**result, "bbox": change(*result["bbox"])}
        for record in scenes.images
        for result in to_results(GroundTruth(scenes).prompts(record, NO_PIXELS))
    ]
    source = CocoResults(_write(tmp_path, entries), scenes)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (told is not None)
    assert told is None or (told in lines[0] and "Write [x, y, width, height]" in lines[0])
    for record in scenes.images:
        boxes = np.array([e["bbox"] for e in entries if e["image_id"] == record.id])
        boxes[:, 2:] += boxes[:, :2]
        expected = clean(record, boxes, np.ones(len(boxes)), np.ones(len(boxes)))
        assert np.array_equal(source.prompts(record, NO_PIXELS).boxes, expected.boxes)


def _annotated(scenes: CocoDataset) -> list[dict[str, Any]]:
    """The annotated boxes as results."""
    return [
        result
        for record in scenes.images
        for result in to_results(GroundTruth(scenes).prompts(record, NO_PIXELS))
    ]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda category: category - 1, "fit if each category_id is 1 less than it should be"),
        (lambda category: category + 1, "fit if each category_id is 1 more than it should be"),
        (lambda category: 1, "write the data set's own category ids"),
        (lambda category: category, None),
    ],
)
def test_boxes_with_the_categories_of_others_are_noticed(
    tmp_path: Path,
    scenes: CocoDataset,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[int], int],
    told: str | None,
) -> None:
    entries = [{**r, "category_id": change(r["category_id"])} for r in _annotated(scenes)]
    CocoResults(_write(tmp_path, entries), scenes)
    found = [r.getMessage() for r in caplog.records if "have its category" in r.getMessage()]
    assert len(found) == (told is not None)
    assert told is None or f"of {len(entries)} boxes that are where an object is" in found[0]
    assert told is None or told in found[0]


def test_boxes_under_the_ids_of_other_pictures_are_noticed(
    tmp_path: Path, scenes: CocoDataset, caplog: pytest.LogCaptureFixture
) -> None:
    ids = [record.id for record in scenes.images]
    entries = [{**r, "image_id": ids[ids.index(r["image_id"]) - 1]} for r in _annotated(scenes)]
    CocoResults(_write(tmp_path, entries), scenes)
    assert "under the right image_id?" in caplog.text


def test_one_kind_of_object_found_well_is_no_mistake(
    tmp_path: Path, scenes: CocoDataset, caplog: pytest.LogCaptureFixture
) -> None:
    entries = _annotated(scenes)
    one = [result for result in entries if result["category_id"] == entries[0]["category_id"]]
    CocoResults(_write(tmp_path, one), scenes)
    assert "annotated objects" not in caplog.text
    assert "category" not in caplog.text


def test_names_stand_for_ids(
    tmp_path: Path, scenes: CocoDataset, caplog: pytest.LogCaptureFixture
) -> None:
    """As ultralytics names pictures; "007" is a file's name, "7" an id."""
    caplog.set_level(logging.INFO)
    first, second, *_ = scenes.images
    name = scenes.category_names[4]
    entries = [
        _result("000009"),
        _result(first.path.name, category_id=name.upper()),
        _result(second.path.stem),
        _result("elsewhere.jpg"),
        _result(str(first.id)),
    ]
    source = CocoResults(_write(tmp_path, entries), scenes)
    assert source.prompts(first, NO_PIXELS).category_ids.tolist() == [4, 1]
    assert len(source.prompts(second, NO_PIXELS)) == 1
    assert f"2 results write image_id as {first.path.name!r}" in caplog.text
    assert f"1 results write category_id as {name.upper()!r}" in caplog.text


def test_a_score_by_another_name_and_as_text(
    tmp_path: Path, scenes: CocoDataset, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    one = _result(confidence=0.25)
    del one["score"]
    source = CocoResults(_write(tmp_path, [one, _result(score="0.75")]), scenes)
    assert source.prompts(scenes.images[0], NO_PIXELS).scores.tolist() == [0.75, 0.25]
    assert "1 results write score as 'confidence'" in caplog.text
    assert 'written as text, as "0.75"' in caplog.text


@pytest.mark.parametrize(("score", "told"), [(-0.5, "from -0.5 to 0.5"), (87, "from 0.5 to 87")])
def test_scores_that_are_no_probabilities_are_noticed(
    tmp_path: Path, scenes: CocoDataset, caplog: pytest.LogCaptureFixture, score: float, told: str
) -> None:
    CocoResults(_write(tmp_path, [_result(), _result(score=score)]), scenes)
    assert f"scores go {told}: write probabilities" in caplog.text


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"images": [], "annotations": []}, "not a list of COCO results.*this looks like annot"),
        ({}, "not a list of COCO results"),
        (3, "not a list of COCO results"),
        (None, "not a list of COCO results"),
        ([_result(), 5], "result 1 has no bbox"),
        ([_result(bbox=[1, 2, 3])], "result 0 has no bbox"),
        ([_result(bbox=[1, 2, 3, None])], "result 0 has no bbox"),
        ([_result(score="high")], "result 0 has score 'high', not a number"),
        ([_result(score=True)], "result 0 has score True"),
        ([_result(image_id="a")], "result 0 has image_id 'a'"),
        ([_result(score=[0.9])], r"result 0 has score \[0\.9\], not a number"),
        (
            [{**_result(), "box": 3, "bbox": None}],
            "no bbox .*, but image_id, category_id, score, box",
        ),
        ([_result(bbox={"x": 1})], "no bbox .*, but {'x': 1}"),
        ([[_result()]], "result 0 has no bbox .*, it is no object"),
        ({"results": [_result()]}, "but an object with results: write"),
        ([_result(2**63)], f"result 0 has image_id {2**63}, no whole number"),
        ([_result(), _result(category_id=2**63)], f"result 1 has category_id {2**63}"),
        ([_result(True)], "result 0 has image_id True"),
        ([_result("other.jpg")], "image_id 'other.jpg', no whole number: write the picture's id"),
        ([_result(category_id=1.5)], "result 0 has category_id 1.5"),
        ([_result(77), _result(78)], "boxes of 2 images, none of which is among the"),
        ([_result(category_id=77)], "has category ids 77, the data set has 1, 2, 3"),
    ],
)
def test_a_file_of_something_else(
    tmp_path: Path, scenes: CocoDataset, content: Any, problem: str
) -> None:
    with pytest.raises(DataError, match=rf"boxes\.json.*{problem}") as caught:
        CocoResults(_write(tmp_path, content), scenes)
    assert "\n" not in str(caught.value)


def test_missing_and_damaged_files(tmp_path: Path, scenes: CocoDataset) -> None:
    with pytest.raises(DataError, match=r"there is no file of boxes .*none\.json"):
        CocoResults(tmp_path / "none.json", scenes)
    with pytest.raises(DataError, match="cannot be read"):
        CocoResults(tmp_path, scenes)
    (tmp_path / "a.json").write_text('[{"image_id": 1,')
    with pytest.raises(DataError, match=r"a\.json is not JSON"):
        CocoResults(tmp_path / "a.json", scenes)


def test_some_categories_or_pictures_outside_of_the_data_set(
    tmp_path: Path, scenes: CocoDataset, caplog: pytest.LogCaptureFixture
) -> None:
    entries = [_result(), _result(category_id=50), _result(category_id=50), _result(99)]
    source = CocoResults(_write(tmp_path, entries), scenes)
    assert len(source.prompts(scenes.images[0], NO_PIXELS)) == 3
    assert "2 of 3 boxes have categories that the data set lacks (ids 50)" in caplog.text


def test_equal_results_stay_and_are_counted(
    tmp_path: Path, scenes: CocoDataset, caplog: pytest.LogCaptureFixture
) -> None:
    """The same id means nothing; the same box, category and score are a suspicion."""
    same_id = [_result(id=7), _result(id=7, score=0.4), _result(2, id=7)]
    source = CocoResults(_write(tmp_path, same_id), scenes)
    assert len(source.prompts(scenes.images[0], NO_PIXELS)) == 2
    assert "results are there before" not in caplog.text
    source = CocoResults(_write(tmp_path, [*same_id, _result(), _result(2)]), scenes)
    assert len(source.prompts(scenes.images[0], NO_PIXELS)) == 3
    assert "boxes.json: 2 results are there before" in caplog.text


def test_what_the_cache_keeps_survives_export_and_import(
    tmp_path: Path, scenes: CocoDataset, caplog: pytest.LogCaptureFixture
) -> None:
    """Detector, cache, file, file of the file: boxes, scores, categories and order, bit for bit."""

    class Detector:
        """300 boxes a picture, of 90 categories, many scores twice."""

        name = "detector"

        def fingerprint(self) -> str:
            return ""

        def prompts(self, record: ImageRecord, image: NDArray[np.uint8]) -> Prompts:
            rng = np.random.default_rng(record.id)
            size = [record.width, record.height]
            corners = np.sort(rng.uniform(-20, size, (300, 2, 2)), axis=1).reshape(-1, 4)
            scores = rng.uniform(size=300) * 10.0 ** rng.integers(-9, 1, 300)
            scores[100:150] = scores[:50]
            return clean(record, corners, scores, rng.integers(1, 91, 300))

    dataset = scenes
    kept = cached(Detector(), dataset, tmp_path / "cache")
    found = {r.id: kept.prompts(r, dataset.load(r)) for r in dataset.images}
    assert min(map(len, found.values())) > 250
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    write_boxes(dataset, kept, first)
    write_boxes(dataset, open_prompts(str(first), dataset), second)
    assert first.read_bytes() == second.read_bytes()
    for source in (open_prompts(str(second), dataset), kept):
        for record in dataset.images:
            again, expected = source.prompts(record, dataset.load(record)), found[record.id]
            assert np.array_equal(again.boxes, expected.boxes)
            assert np.array_equal(again.scores, expected.scores)
            assert np.array_equal(again.category_ids, expected.category_ids)


def test_no_boxes_at_all_are_possible_with_a_warning(
    tmp_path: Path, scenes: CocoDataset, caplog: pytest.LogCaptureFixture
) -> None:
    source = CocoResults(_write(tmp_path, []), scenes)
    (told,) = caplog.records
    assert "boxes.json has no boxes at all" in told.getMessage()
    assert told.levelname == "WARNING"
    assert len(source.prompts(scenes.images[0], NO_PIXELS)) == 0


def test_what_is_written_can_be_read_back(tmp_path: Path, scenes: CocoDataset) -> None:
    truth = GroundTruth(scenes)
    written = [truth.prompts(record, NO_PIXELS) for record in scenes.images]
    path = tmp_path / "new" / "boxes.json"
    write_results(written, path)
    assert set(json.loads(path.read_text())[0]) == {"image_id", "category_id", "bbox", "score"}
    source = CocoResults(path, scenes)
    for record, expected in zip(scenes.images, written, strict=True):
        found = source.prompts(record, NO_PIXELS)
        assert np.array_equal(found.boxes, expected.boxes)
        assert np.array_equal(found.category_ids, expected.category_ids)
    assert [p.name for p in path.parent.iterdir()] == ["boxes.json"]


def test_a_result_has_plain_numbers() -> None:
    prompts = Prompts(3, np.array([[1, 2, 4, 8]]), np.array([0.5]), np.array([9]))
    assert to_results(prompts) == [
        {"image_id": 3, "category_id": 9, "bbox": [1.0, 2.0, 3.0, 6.0], "score": 0.5}
    ]
