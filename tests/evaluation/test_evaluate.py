from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ptq4sam.data import CocoDataset, ImageFolder, ImageRecord, ImageSet
from ptq4sam.errors import ConfigError, DataError
from ptq4sam.evaluation import MaskScores, mask_ious
from ptq4sam.evaluation.evaluate import (
    Picture,
    evaluate_sam,
    has_truth,
    require_truth,
    select,
)
from ptq4sam.evaluation.prompting import Prompting
from ptq4sam.families.checkpoint import load_sam
from ptq4sam.prompts import GroundTruth, Prompts, cached
from ptq4sam.runs.pictures import PictureWriter, file_names
from ptq4sam.sam.model import Sam
from tests.tiny_runs import SMALL, Tiny

FIELDS = ("boxes", "scores", "category_ids")

pytest_plugins = ("tests.tiny_fixtures",)


@pytest.fixture(scope="module")
def sam(tiny: Tiny) -> Sam:
    return load_sam(SMALL, tiny.checkpoint)


def test_mean_iou_compares_each_mask_with_its_own_object(sam: Sam, tiny: Tiny) -> None:
    dataset = CocoDataset(tiny.images(), tiny.annotations(), limit=2)
    source = GroundTruth(dataset)
    seen: list[Picture] = []
    evaluation = evaluate_sam(
        sam, dataset, source, Prompting(max_per_image=2), on_picture=seen.append
    )
    assert [len(picture.prompts) for picture in seen] == [2, 2]
    ious = []
    for picture in seen:
        objects = [item for item in dataset.instances(picture.record) if not item.iscrowd][:2]
        np.testing.assert_array_equal(picture.prompts.boxes, [item.box for item in objects])
        truth = np.stack([item.mask for item in objects])
        ious += mask_ious(picture.segmented.masks, truth).tolist()
    assert evaluation.metrics["mean_iou"] == pytest.approx(np.mean(ious))
    assert evaluation.masks == len(evaluation.results) == 4
    areas = [
        item.area
        for picture in seen
        for item in [i for i in dataset.instances(picture.record) if not i.iscrowd][:2]
    ]
    for size, low, high in (("small", 0, 1024), ("medium", 1024, 9216), ("large", 9216, np.inf)):
        chosen = [iou for iou, area in zip(ious, areas, strict=True) if low <= area <= high]
        expected = np.mean(chosen) if chosen else np.nan
        assert evaluation.metrics[f"mean_iou_{size}"] == pytest.approx(expected, nan_ok=True)


def test_crowd_regions_alone_are_nothing_to_measure_accuracy_on(tiny: Tiny, tmp_path: Path) -> None:
    content = json.loads(tiny.annotations().read_text())
    for annotation in content["annotations"][1:]:
        annotation["iscrowd"] = 1
    own = tmp_path / "own.json"
    own.write_text(json.dumps(content))
    dataset = CocoDataset(tiny.images(), own)
    assert require_truth(dataset, own) is dataset
    content["annotations"][0]["iscrowd"] = 1
    own.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="crowd regions alone"):
        require_truth(CocoDataset(tiny.images(), own), own)


def test_names_of_pictures_are_each_their_own() -> None:
    dataset = ImageSet(skip_bad=False)
    names = ("a/one.jpg", "b/one.jpg", "two.jpg")
    dataset.images = [ImageRecord(n, Path(name), 1, 1) for n, name in enumerate(names, start=1)]
    assert file_names(dataset) == {1: "one-1", 2: "one-2", 3: "two"}
    dataset.images.append(ImageRecord(4, Path("one-2.png"), 1, 1))
    assert file_names(dataset) == {1: "one-1", 2: "one-2", 3: "two-3", 4: "one-2-4"}


def test_boxes_that_are_used() -> None:
    boxes = np.tile(np.array([1, 2, 3, 4], np.float32), (150, 1))
    scores = np.linspace(1, 0, 150, dtype=np.float32)
    prompts = Prompts(1, boxes, scores, np.ones(150, np.int64))
    assert len(select(prompts, Prompting())) == 100
    assert len(select(prompts, Prompting(max_per_image=None))) == 150
    assert len(select(prompts, Prompting(max_per_image=None, score_threshold=0.5))) == 75


def test_kept_ground_truth_is_still_ground_truth(tiny: Tiny, tmp_path: Path) -> None:
    dataset = CocoDataset(tiny.images(), tiny.annotations())
    assert isinstance(cached(GroundTruth(dataset), dataset, tmp_path), GroundTruth)


def test_a_model_agrees_with_itself(sam: Sam, tiny: Tiny) -> None:
    dataset = CocoDataset(tiny.images(), tiny.annotations(), limit=1)
    source = GroundTruth(dataset)
    evaluation = evaluate_sam(sam, dataset, source, Prompting(max_per_image=2), reference=sam)
    assert evaluation.metrics.pop("agreement") == 1
    assert evaluation.metrics == pytest.approx(evaluation.reference_metrics, nan_ok=True)


def test_pictures_without_boxes_count_but_are_not_segmented(sam: Sam, tiny: Tiny) -> None:
    dataset = CocoDataset(tiny.images(), tiny.annotations())
    source = GroundTruth(dataset)
    seen: list[Picture] = []

    class Nothing:
        name = "nothing"

        def fingerprint(self) -> str:
            return ""

        def prompts(self, record: object, image: object) -> object:
            return source.prompts(record, image).first(0)

    evaluation = evaluate_sam(sam, dataset, Nothing(), Prompting(), on_picture=seen.append)
    assert (evaluation.pictures, evaluation.masks, seen) == (3, 0, [])
    assert evaluation.metrics["AP"] == 0


def test_a_picture_without_boxes_costs_no_forward_pass_and_loses_nothing(
    sam: Sam, tiny: Tiny
) -> None:
    """Of three pictures the second has no boxes: two are encoded, all three are scored."""
    dataset = CocoDataset(tiny.images(), tiny.annotations())
    truth = GroundTruth(dataset)
    without = dataset.images[1].id

    class AllButOne:
        name = "all but one"

        def fingerprint(self) -> str:
            return ""

        def prompts(self, record: ImageRecord, image: NDArray[np.uint8]) -> Prompts:
            return truth.prompts(record, image).first(0 if record.id == without else 100)

    encoded: list[object] = []
    hook = sam.image_encoder.register_forward_hook(lambda *_: encoded.append(1))
    try:
        evaluation = evaluate_sam(sam, dataset, AllButOne(), Prompting(), reference=sam)
    finally:
        hook.remove()
    # The model and the float model that it is compared with.
    assert len(encoded) == 2 * 2
    assert evaluation.pictures == len(dataset.images) == 3
    assert {result["image_id"] for result in evaluation.results} == {
        record.id for record in dataset.images if record.id != without
    }
    scores = MaskScores(dataset)
    scores.results = evaluation.results
    assert evaluation.metrics["AP"] == scores.summarize()["AP"]


def test_categories_that_the_data_set_lacks_are_counted(
    sam: Sam, tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = CocoDataset(tiny.images(), tiny.annotations(), limit=1)
    truth = GroundTruth(dataset)

    class Foreign:
        name = "foreign"

        def fingerprint(self) -> str:
            return ""

        def prompts(self, record: ImageRecord, image: NDArray[np.uint8]) -> Prompts:
            found = truth.prompts(record, image).first(2)
            strange = Prompts(record.id, found.boxes, found.scores, np.array([91, 95]))
            both = [np.concatenate([getattr(p, key) for p in (found, strange)]) for key in FIELDS]
            return Prompts(record.id, *both)

    evaluation = evaluate_sam(sam, dataset, Foreign(), Prompting())
    assert "foreign: 2 of 4 boxes have categories that the data set lacks (ids 91, 95)" in (
        caplog.text
    )
    assert evaluation.masks == 4
    caplog.clear()
    known = evaluate_sam(sam, dataset, truth, Prompting(max_per_image=2))
    assert evaluation.metrics["AP"] == known.metrics["AP"]
    assert not caplog.records


@pytest.mark.parametrize("shift", [0, 1])
def test_a_detector_with_the_categories_of_others_is_noticed(
    sam: Sam, tiny: Tiny, caplog: pytest.LogCaptureFixture, shift: int
) -> None:
    """Its classes are numbered otherwise than those of the data set."""
    dataset = CocoDataset(tiny.images(), tiny.annotations())
    truth = GroundTruth(dataset)

    class Numbered:
        name = "numbered"

        def fingerprint(self) -> str:
            return ""

        def prompts(self, record: ImageRecord, image: NDArray[np.uint8]) -> Prompts:
            found = truth.prompts(record, image)
            return Prompts(record.id, found.boxes, found.scores, found.category_ids + shift)

    evaluate_sam(sam, dataset, Numbered(), Prompting())
    told = "they fit if each category_id is 1 more than it should be"
    assert (told in caplog.text) == bool(shift)


def test_truth_is_known_of_annotated_data_only(tiny: Tiny) -> None:
    assert has_truth(CocoDataset(tiny.images(), tiny.annotations()))
    assert not has_truth(ImageFolder(tiny.images()))


def test_what_cannot_be_scored_is_told_before_anything_is_segmented(
    sam: Sam, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = json.loads(tiny.annotations().read_text())
    del content["annotations"][0]["segmentation"]
    (tmp_path / "a.json").write_text(json.dumps(content))
    dataset = CocoDataset(tiny.images(), tmp_path / "a.json", masks=False)
    monkeypatch.setattr(sam, "embed", lambda pixels: pytest.fail("a picture was encoded"))
    with pytest.raises(DataError, match=r"annotation id 1 of .*: scores need its mask"):
        evaluate_sam(sam, dataset, GroundTruth(dataset), Prompting())


def test_only_damaged_pictures(sam: Sam, tiny: Tiny, tmp_path: Path) -> None:
    for path in tiny.images().iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[:900])
    dataset = CocoDataset(tmp_path, tiny.annotations(), skip_bad=True)
    with pytest.raises(DataError, match="no picture is left"):
        evaluate_sam(sam, dataset, GroundTruth(dataset), Prompting())


def test_pictures_of_one_name_do_not_overwrite_each_other(
    sam: Sam, tiny: Tiny, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    content = next(iter(tiny.images().iterdir())).read_bytes()
    for name in ("a.jpg", "a.jpeg"):
        (images / name).write_bytes(content)
    dataset = ImageFolder(images)
    annotated = CocoDataset(tiny.images(), tiny.annotations(), limit=1)
    prompts = GroundTruth(annotated).prompts(annotated.images[0], annotated.load(dataset.images[0]))

    class Fixed:
        name = "fixed"

        def fingerprint(self) -> str:
            return ""

        def prompts(self, record: object, image: object) -> object:
            return prompts.first(1)

    writer = PictureWriter(tmp_path / "shown", dataset, threshold=0)
    evaluation = evaluate_sam(sam, dataset, Fixed(), Prompting(), on_picture=writer)
    assert {path.name for path in (tmp_path / "shown").iterdir()} == {"a-1.jpg", "a-2.jpg"}
    assert evaluation.metrics == {}
