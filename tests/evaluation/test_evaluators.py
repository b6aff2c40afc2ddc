"""AP by two evaluators, and LVIS's rules by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ptq4sam.data import CocoDataset
from ptq4sam.errors import DataError, DependencyError
from ptq4sam.evaluation import BoxScores, MaskScores, evaluators
from ptq4sam.evaluation.evaluators import FASTER, REFERENCE, evaluator_of
from ptq4sam.prompts import CocoResults, GroundTruth, Prompts

NO_PIXELS = np.zeros((0, 0, 3), np.uint8)
SIDE = 40
Make = Callable[..., CocoDataset]


@pytest.fixture
def faster() -> None:
    """For tests of faster-coco-eval."""
    pytest.importorskip("faster_coco_eval", reason="extra evaluation: faster-coco-eval")


def _moved(dataset: CocoDataset, seed: int) -> tuple[MaskScores, BoxScores]:
    """True masks, moved and repeated with scores of which some are equal, and boxes of noise."""
    masks, boxes, rng = MaskScores(dataset), BoxScores(dataset), np.random.default_rng(seed)
    truth = GroundTruth(dataset)
    for record in dataset.images[:-1]:
        prompts, exact = truth.prompts(record, NO_PIXELS), truth.truth(record)
        for pixels in (0, 2, 5):
            scores = rng.integers(0, 8, len(prompts)) / 8
            masks.add(record, np.roll(exact, pixels, axis=(1, 2)), scores, prompts.category_ids)
            noisy = prompts.boxes + rng.normal(0, 3, prompts.boxes.shape).astype(np.float32)
            boxes.add(Prompts(record.id, noisy, scores, prompts.category_ids))
    return masks, boxes


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize("seed", [0, 1])
def test_both_evaluators_give_the_same_digits(
    scenes: CocoDataset, tmp_path: Path, seed: int
) -> None:
    content = json.loads(scenes.path.read_text())
    for annotation in content["annotations"][:: 5 + seed]:
        annotation["iscrowd"] = 1
    path = tmp_path / "crowds.json"
    path.write_text(json.dumps(content))
    dataset = CocoDataset(scenes.images[0].path.parent, path)
    for scores in _moved(dataset, seed):
        exact = scores.summarize(REFERENCE)
        before = json.dumps(dataset.ground_truth.dataset)
        fast = scores.summarize(FASTER)
        # Theirs writes masks into the annotations that it gets.
        assert json.dumps(dataset.ground_truth.dataset) == before
        assert list(exact) == list(fast)
        # pycocotools adds 2e-16 to what it divides by.
        np.testing.assert_allclose(list(fast.values()), list(exact.values()), rtol=1e-14)
        assert [f"{v:.10f}" for v in fast.values()] == [f"{v:.10f}" for v in exact.values()]
        assert 5 < exact["AP"] < 95
        np.testing.assert_array_equal(list(scores.summarize(REFERENCE).values()), [*exact.values()])
    nothing = MaskScores(dataset)
    expected = [*nothing.summarize(REFERENCE).values()]
    np.testing.assert_array_equal([*nothing.summarize(FASTER).values()], expected)


@pytest.mark.usefixtures("faster")
def test_the_fast_one_is_used_where_it_is_installed(
    scenes: CocoDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert evaluator_of(scenes) == FASTER
    assert evaluator_of(scenes, REFERENCE) == REFERENCE
    monkeypatch.setattr(evaluators, "find_spec", lambda name: None)
    assert evaluator_of(scenes) == REFERENCE
    with pytest.raises(DependencyError, match=r"pip install 'ptq4sam\[evaluation\]'"):
        evaluator_of(scenes, FASTER)


@pytest.fixture
def lvis(tmp_path: Path) -> Make:
    """Makes a data set as LVIS writes it, of pictures in train2017 and val2017."""

    def make(
        objects: Sequence[tuple[int, int]],
        absent: dict[int, list[int]] | None = None,
        partly: dict[int, list[int]] | None = None,
        change: Callable[[dict[str, Any]], None] = lambda content: None,
    ) -> CocoDataset:
        pictures = {1: "val2017/000000000001.jpg", 2: "train2017/000000000002.jpg"}
        pictures[3] = "train2017/000000000003.jpg"
        content: dict[str, Any] = {"images": [], "annotations": []}
        for id_, name in pictures.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            Image.new("RGB", (SIDE, SIDE)).save(tmp_path / name)
            image = {"id": id_, "width": SIDE, "height": SIDE}
            image["coco_url"] = f"http://images.cocodataset.org/{name}"
            image["neg_category_ids"] = (absent or {}).get(id_, [])
            image["not_exhaustive_category_ids"] = (partly or {}).get(id_, [])
            content["images"].append(image)
        content["categories"] = [
            {"id": id_, "name": name, "synset": f"{name}.n.01", "frequency": frequency}
            for id_, name, frequency in ((1, "apricot", "r"), (2, "bolo", "c"), (3, "cup", "f"))
        ]
        for number, (image_id, category) in enumerate(objects, start=1):
            place = 10 * category
            polygon = [place, 4, place + 8, 4, place + 8, 12, place, 12]
            content["annotations"].append(
                {
                    "id": number,
                    "image_id": image_id,
                    "category_id": category,
                    "segmentation": [polygon],
                    "bbox": [place, 4, 8, 8],
                    "area": 64,
                }
            )
        change(content)
        path = tmp_path / "lvis_v1_val.json"
        path.write_text(json.dumps(content))
        return CocoDataset(tmp_path, path)

    return make


def _mask(category: int, right: bool = True) -> np.ndarray:
    """The only object of a category, or what overlaps no object."""
    mask = np.zeros((1, SIDE, SIDE), np.bool_)
    place = 10 * category
    mask[0, 4:12, place : place + 8] = right
    mask[0, 30:38, place : place + 8] = not right
    return mask


def _scores(dataset: CocoDataset, found: Sequence[tuple[int, int, bool, float]]) -> MaskScores:
    scores, records = MaskScores(dataset), {record.id: record for record in dataset.images}
    for image_id, category, right, score in found:
        scores.add(records[image_id], _mask(category, right), [score], [category])
    return scores


def test_pictures_of_both_splits_are_found_by_their_addresses(lvis: Make) -> None:
    dataset = lvis([(1, 1), (2, 2)], absent={1: [2]}, partly={2: [2]})
    assert [record.path.parent.name for record in dataset.images] == [
        *("val2017", "train2017", "train2017")
    ]
    federated = dataset.federated
    assert federated is not None
    assert federated.absent == {1: {2}, 2: set(), 3: set()}
    assert federated.not_exhaustive == {1: set(), 2: {2}, 3: set()}
    assert federated.frequencies == {1: "r", 2: "c", 3: "f"}


@pytest.mark.usefixtures("faster")
def test_federated_rules_by_hand(lvis: Make) -> None:
    """What is found of each category, best first, and what that makes.

    1, rare: its object. Precision 1 at every recall: AP 1.
    2, common: in picture 3 something (nobody looked: does not count), in picture 2 something
    (certainly not there: wrong), in picture 1 its object: precision 1/2 at every recall: AP 1/2.
    3, frequent: in picture 1 something more (not all are annotated: does not count), its object.
    AP 1.
    """
    dataset = lvis([(1, 1), (1, 2), (1, 3)], absent={2: [2]}, partly={1: [3]})
    found = [(1, 1, True, 0.5), (3, 2, False, 0.99), (2, 2, False, 0.9), (1, 2, True, 0.8)]
    found += [(1, 3, False, 0.9), (1, 3, True, 0.7)]
    summary = _scores(dataset, found).summarize()
    assert summary["AP"] == pytest.approx(100 * (1 + 0.5 + 1) / 3)
    assert [summary[key] for key in ("APr", "APc", "APf")] == pytest.approx([100, 50, 100])
    assert summary["APs"] == pytest.approx(summary["AP"])
    assert summary["AR"] == pytest.approx(100)
    assert math.isnan(summary["APm"])
    assert math.isnan(summary["APl"])


@pytest.mark.usefixtures("faster")
def test_a_missed_object_and_an_exhaustive_picture_count(lvis: Make) -> None:
    """Of two objects of category 2 one is found: AP is 1 up to recall 1/2, at 51 of 101 places.

    What is too much of category 3, of which all is annotated, is wrong: AP 1/2. Of category 1
    nothing is annotated anywhere: it has no AP, and neither have rare categories.
    """
    dataset = lvis([(1, 2), (2, 2), (1, 3)])
    found = [(1, 2, True, 0.5), (1, 3, False, 0.9), (1, 3, True, 0.7)]
    summary = _scores(dataset, found).summarize()
    assert summary["APc"] == pytest.approx(100 * 51 / 101)
    assert summary["APf"] == pytest.approx(50)
    assert summary["AP"] == pytest.approx((100 * 51 / 101 + 50) / 2)
    assert summary["AR"] == pytest.approx((50 + 100) / 2)
    assert math.isnan(summary["APr"])


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize(("better", "expected"), [(299, 100), (300, 0)])
def test_300_masks_of_a_picture_count_of_all_categories_together(
    lvis: Make, better: int, expected: float
) -> None:
    dataset = lvis([(1, 1)])
    crowd = [(1, 2 + n % 2, False, 0.5) for n in range(better)]
    scores = _scores(dataset, [(1, 1, True, 0.1), *crowd, (2, 3, False, 0.9)])
    assert scores.summarize()["AP"] == pytest.approx(expected)


def test_lvis_needs_its_evaluator(lvis: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = lvis([(1, 1)])
    with pytest.raises(DependencyError, match=r"LVIS, whose AP needs faster-coco-eval and not"):
        MaskScores(dataset).summarize(REFERENCE)
    monkeypatch.setattr(evaluators, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r"pip install 'ptq4sam\[evaluation\]'") as caught:
        evaluator_of(dataset)
    assert "\n" not in str(caught.value)


def _without(where: str, field: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        del content[where][-1][field]

    return change


@pytest.mark.parametrize(
    ("where", "field", "told"),
    [
        ("images", "neg_category_ids", "image id 3 has no list neg_category_ids"),
        ("images", "not_exhaustive_category_ids", "has no list not_exhaustive_category_ids"),
        ("categories", "frequency", "category id 3 has frequency None, not r, c or f"),
    ],
)
def test_a_file_of_lvis_without_its_fields(lvis: Make, where: str, field: str, told: str) -> None:
    with pytest.raises(DataError, match=f"is an LVIS file, but .*{told}") as caught:
        lvis([(1, 1)], change=_without(where, field))
    assert "give LVIS v1's own file" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_with_nothing_of_lvis_is_cocos(lvis: Make) -> None:
    def plain(content: dict[str, Any]) -> None:
        for image in content["images"]:
            del image["neg_category_ids"], image["not_exhaustive_category_ids"]
        for category in content["categories"]:
            del category["synset"], category["frequency"]

    assert lvis([(1, 1)], change=plain).federated is None


def test_pictures_of_one_split_alone(lvis: Make, tmp_path: Path) -> None:
    path = lvis([(1, 1)]).path
    with pytest.raises(DataError, match=r"there is .*train2017.*: give ") as caught:
        CocoDataset(tmp_path / "val2017", path)
    assert str(tmp_path) in str(caught.value).rpartition("give ")[2]
    for picture in (tmp_path / "train2017").iterdir():
        picture.unlink()
    (tmp_path / "train2017").rmdir()
    told = r"2 pictures are in train2017, and .* has no such folder: add it"
    with pytest.raises(DataError, match=told) as caught:
        CocoDataset(tmp_path, path)
    assert "\n" not in str(caught.value)


def _of_a_thousand(content: dict[str, Any]) -> None:
    some = content["categories"][0]
    content["categories"] = [{**some, "id": n, "name": str(n)} for n in range(1, 1204)]


def _boxes(path: Path, categories: Sequence[int]) -> Path:
    box = {"image_id": 1, "bbox": [1, 2, 30, 4], "score": 0.5}
    path.write_text(json.dumps([{**box, "category_id": id_} for id_ in categories]))
    return path


def test_boxes_of_coco_on_lvis_and_of_lvis_on_coco(lvis: Make, tmp_path: Path) -> None:
    of_coco = _boxes(tmp_path / "coco_vitdet.json", [1, 2, 3, 4, 5, 6, 7, 8, 90])
    of_lvis = _boxes(tmp_path / "lvis_vitdet.json", [1, 100, 1203, 600, 90, 12, 700, 800, 900])
    dataset = lvis([(1, 1)], change=_of_a_thousand)
    assert len(CocoResults(of_lvis, dataset).prompts(dataset.images[0], NO_PIXELS)) == 9
    with pytest.raises(
        DataError, match=r"coco_vitdet\.json is of another data set.*1203"
    ) as caught:
        CocoResults(of_coco, dataset)
    assert "\n" not in str(caught.value)

    def as_coco(content: dict[str, Any]) -> None:
        _of_a_thousand(content)
        for image in content["images"]:
            del image["neg_category_ids"], image["not_exhaustive_category_ids"]
        ids = _ids_of_coco()
        content["categories"] = [{"id": id_, "name": str(id_)} for id_ in ids]

    dataset = lvis([(1, 1)], change=as_coco)
    assert dataset.federated is None
    assert len(CocoResults(of_coco, dataset).prompts(dataset.images[0], NO_PIXELS)) == 9
    with pytest.raises(
        DataError, match=r"lvis_vitdet\.json is of another data set: most"
    ) as caught:
        CocoResults(of_lvis, dataset)
    assert "\n" not in str(caught.value)


def _ids_of_coco() -> list[int]:
    """COCO's 80 ids, by what is known to lack of 90."""
    return sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})
