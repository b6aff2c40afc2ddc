"""Annotations and pictures of which nothing can be made: one line, or left out with a count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ptq4sam.data import CocoDataset
from ptq4sam.errors import ConfigError, DataError

Change = Callable[[dict[str, Any]], object]


def test_a_missing_picture(files: Any, caplog: pytest.LogCaptureFixture) -> None:
    (files.images / "b.jpg").unlink()
    with pytest.raises(DataError, match=r"image id 11: there is no image file .*b\.jpg.*skip what"):
        files.open()
    dataset = files.open(skip_bad=True)
    assert [r.id for r in dataset.images] == [10, 12]
    assert dataset.skipped == {"missing image": 1}
    assert "skipped 1 x missing image" in caplog.text
    assert [r.id for r in files.open(skip_bad=True, limit=2).images] == [10, 12]
    assert [r.id for r in files.open(limit=1).images] == [10]


def test_a_truncated_picture_is_an_error_or_leaves_the_data_set(
    files: Any, caplog: pytest.LogCaptureFixture
) -> None:
    raw = (files.images / "c.jpg").read_bytes()
    (files.images / "c.jpg").write_bytes(raw[: len(raw) // 2])
    strict, lenient = files.open(), files.open(skip_bad=True)
    with pytest.raises(DataError, match=r"image id 12: .*c\.jpg cannot be read: .*truncated"):
        strict.load(strict.images[2])
    with pytest.raises(DataError, match="skip what is bad"):
        strict.load_or_skip(strict.images[2])
    assert lenient.load_or_skip(lenient.images[0]) is not None
    assert lenient.load_or_skip(lenient.images[2]) is None
    assert [r.id for r in lenient.images] == [10, 11]
    assert lenient.skipped == {"damaged image": 1}
    assert "c.jpg" in caplog.text
    assert sorted(lenient.ground_truth.imgs) == [10, 11]


@pytest.mark.parametrize("empty", ["missing", [], None, [[]]])
def test_an_annotation_without_segmentation(files: Any, empty: Any) -> None:
    def change(content: dict[str, Any]) -> None:
        if empty == "missing":
            del content["annotations"][1]["segmentation"]
        else:
            content["annotations"][1]["segmentation"] = empty

    files.write(change)
    with pytest.raises(DataError, match=r"annotation id 2 of image id 10 \(a\.jpg\): .*skip what"):
        files.open()
    dataset = files.open(skip_bad=True)
    assert [item.annotation_id for item in dataset.instances(dataset.images[0])] == [1]
    assert sum(dataset.skipped.values()) == 1
    if empty != [[]]:
        assert dataset.skipped == {"annotation without segmentation": 1}
    assert len(dataset.ground_truth.anns) == 2


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"segmentation": [[1, 2, 3, 4, 5]]}, "three points"),
        ({"segmentation": [[1, 2, 3, 4, 5, float("nan")]]}, "three points"),
        ({"segmentation": [[1, 2, 3, 4, 5, "6"]]}, "three points"),
        ({"segmentation": "text"}, "neither polygons"),
        ({"segmentation": {"counts": [1200]}}, "neither polygons"),
        ({"segmentation": {"size": [40, 30], "counts": [1200]}}, r"size \[40, 30\], not \[30, 40"),
        ({"segmentation": {"size": [30, 40], "counts": [1199]}}, "do not fill"),
        ({"segmentation": {"size": [30, 40], "counts": [1300, -100]}}, "not numbers"),
        ({"segmentation": {"size": [30, 40], "counts": ""}}, "not numbers"),
        ({"segmentation": {"size": [30, 40], "counts": "1234"}}, "do not fill"),
        ({"category_id": 4}, "no category 4, there are 3, 7"),
        ({"segmentation": {"size": [30, 40], "counts": "b'x"}}, "not numbers"),
        ({"segmentation": [[[1, 2], [3, 4, 5], [6, 7]]]}, "three points"),
        ({"segmentation": [[1, 2], [3, 4], [5, "6"]]}, "three points"),
        ({"category_id": [3]}, r"no category \[3\]"),
        ({"image_id": 99}, "no such image"),
        ({"bbox": [1, 2, 3]}, "bbox is"),
        ({"bbox": [1, 2, 3, float("inf")]}, "bbox is"),
        ({"bbox": "1, 2, 3, 4"}, "bbox is"),
        ({"category_id": "cat"}, "no category 'cat'"),
        ({"area": "large"}, "area is"),
        ({"bbox": ["1", "2", "3", "wide"]}, "bbox is"),
        ({"iscrowd": 2}, "iscrowd is 2"),
    ],
)
def test_an_unusable_annotation(files: Any, change: dict[str, Any], problem: str) -> None:
    files.write(lambda content: content["annotations"][1].update(change))
    with pytest.raises(DataError, match=rf"annotation id 2 of image id .*{problem}") as caught:
        files.open()
    assert "\n" not in str(caught.value)
    dataset = files.open(skip_bad=True)
    assert dataset.skipped == {"unusable annotation": 1}
    assert [item.annotation_id for item in dataset.instances(dataset.images[0])] == [1]


def test_all_skipped_annotations_are_counted_in_one_warning(
    files: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def change(content: dict[str, Any]) -> None:
        for annotation in content["annotations"]:
            del annotation["segmentation"]

    files.write(change)
    with pytest.raises(DataError, match=r"annotation id 1 .*\(and 2 more\)"):
        files.open()
    dataset = files.open(skip_bad=True)
    assert dataset.skipped == {"annotation without segmentation": 3}
    assert len(caplog.records) == 1
    assert dataset.annotated_images() == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda c: c.pop("images"), 'no list "images"'),
        (lambda c: c.update(images={}), 'no list "images"'),
        (lambda c: c.update(images=[]), "lists no image"),
        (lambda c: c.update(annotations=7), 'no list "annotations"'),
        (lambda c: c.pop("categories"), 'no list "categories"'),
        (lambda c: c["images"].append(5), r"images\[3\] is not an object"),
        (lambda c: c["images"][1].update(id=10), "image id 10 is there twice"),
        (lambda c: c["images"][1].update(id="b"), r"images\[1\]\.id is 'b', int needed"),
        (lambda c: c["images"][1].update(id=11.5), r"images\[1\]\.id is 11\.5, int needed"),
        (lambda c: c["images"][1].update(id="10"), "image id 10 is there twice"),
        (lambda c: c["images"][1].pop("file_name"), r"images\[1\]\.file_name is None"),
        (
            lambda c: c["images"][1].update(filename=c["images"][1].pop("file_name")),
            r"images\[1\]\.file_name is None, str needed \(there is 'filename'\)",
        ),
        (lambda c: c["images"][1].update(id=2**63), rf"images\[1\]\.id is {2**63}, int needed"),
        (lambda c: c.update(image=c.pop("images")), "looks like SA-1B's file of one picture"),
        (lambda c: (c.pop("categories"), c.update(shapes=[])), "but images, annotations, shapes; "),
        (lambda c: c["images"][1].update(file_name=""), r"images\[1\]\.file_name is ''"),
        (lambda c: c["images"][1].update(width=0), "image id 11 has no pixels"),
        (lambda c: c["images"][1].update(height="tall"), r"images\[1\]\.height is 'tall', int n"),
        (lambda c: c["annotations"][1].update(id=1), "annotation id 1 is there twice"),
        (
            lambda c: c["annotations"][1].update(image_id=None),
            r"annotations\[1\]\.image_id is None",
        ),
        (lambda c: c["annotations"].insert(0, []), r"annotations\[0\] is not an object"),
        (lambda c: c["categories"][1].update(id=3), "category id 3 is there twice"),
        (lambda c: c["categories"][1].update(name=5), r"categories\[1\]\.name is 5, str needed"),
    ],
)
@pytest.mark.parametrize("skip_bad", [False, True])
def test_json_that_is_not_coco_is_one_line(
    files: Any, change: Change, problem: str, skip_bad: bool
) -> None:
    files.write(change)
    with pytest.raises(DataError, match=rf"instances\.json.*{problem}") as caught:
        files.open(skip_bad=skip_bad)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "\xff\xfe", "[" * 100_000])
def test_what_is_not_json_is_one_line(files: Any, text: str) -> None:
    files.annotations.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"instances\.json is not JSON: ") as caught:
        files.open()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "null", "5"])
def test_json_that_is_no_object(files: Any, text: str) -> None:
    files.annotations.write_text(text)
    with pytest.raises(DataError, match=r"instances\.json is not in COCO format: it is not an obj"):
        files.open()


def test_missing_files_and_impossible_limits(files: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no annotations file .*x\.json"):
        CocoDataset(files.images, tmp_path / "x.json")
    with pytest.raises(DataError, match="there is no image folder"):
        CocoDataset(tmp_path / "nowhere", files.annotations)
    with pytest.raises(DataError, match="cannot be read"):
        CocoDataset(files.images, files.images)
    with pytest.raises(ConfigError, match="first -1 pictures"):
        files.open(limit=-1)
