"""Annotations that say the same in another form, and such as do not say what they seem to."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

Change = Callable[[dict[str, Any]], object]


def _pairs(polygon: list[float]) -> list[list[float]]:
    return [list(point) for point in zip(polygon[::2], polygon[1::2], strict=True)]


def _runs(polygon: list[float], number: type, as_bytes: bool = False) -> dict[str, Any]:
    encoded = coco_mask.merge(coco_mask.frPyObjects([polygon], 30, 40))
    if as_bytes:
        return {"size": [30, 40], "counts": str(encoded["counts"])}
    changes = np.flatnonzero(np.diff(coco_mask.decode(encoded).ravel("F"), prepend=0, append=2))
    lengths = np.diff(changes, prepend=0)
    return {"size": [30, 40], "counts": [number(length) for length in lengths]}


@pytest.mark.parametrize(
    "written",
    [
        lambda polygon: polygon,
        _pairs,
        lambda polygon: [_pairs(polygon)],
        lambda polygon: [_runs(polygon, int)],
        lambda polygon: _runs(polygon, float),
        lambda polygon: _runs(polygon, int, as_bytes=True),
    ],
)
def test_a_segmentation_in_another_form_is_the_same_mask(
    files: Any, caplog: pytest.LogCaptureFixture, written: Callable[[list[float]], Any]
) -> None:
    """One polygon without a list of polygons, points as pairs, run lengths of another type."""
    caplog.set_level(logging.INFO)
    expected = [item.mask for item in files.open().instances(files.open().images[0])]

    def change(content: dict[str, Any]) -> None:
        for annotation in content["annotations"]:
            annotation["segmentation"] = written(annotation["segmentation"][0])

    files.write(change)
    dataset = files.open()
    found = [item.mask for item in dataset.instances(dataset.images[0])]
    assert len(found) == 2
    assert all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))
    assert "3 segmentations are not quite in COCO's form" in caplog.text
    assert not dataset.skipped


def test_an_area_that_is_none_is_computed(files: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    files.write(lambda c: [a.update(area=n) for n, a in enumerate(c["annotations"], start=-1)])
    dataset = files.open()
    assert [item.area for item in dataset.instances(dataset.images[0])] == [80, 180]
    assert [item.area for item in dataset.instances(dataset.images[2])] == [1]
    assert "2 areas are 0 or less: computed from the masks" in caplog.text


def test_numbers_as_text_and_an_empty_box(files: Any) -> None:
    def change(content: dict[str, Any]) -> None:
        one, other, _ = content["annotations"]
        one.update(area="80.0", bbox=["4", "5.0", 10, "8e0"])
        other["bbox"] = []

    files.write(change)
    dataset = files.open()
    one, other = dataset.instances(dataset.images[0])
    assert (one.area, one.box.tolist()) == (80, [4, 5, 14, 13])
    assert other.box.tolist() == [20, 10, 32, 25]


def test_annotations_without_ids_are_numbered(files: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for id_ in (None, "3f2a"):
        files.write(lambda c, id_=id_: [a.update(id=id_) for a in c["annotations"]])
        dataset = files.open()
        assert [item.annotation_id for item in dataset.instances(dataset.images[0])] == [1, 2]
    assert caplog.text.count("no annotation has a number as id") == 2


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda c: c["annotations"].append({**c["annotations"][0], "id": 9}),
            "1 annotations are there before, with the same picture, category, bbox and area",
        ),
        (
            lambda c: c["images"].append({**c["images"][0], "id": 99}),
            "1 of 4 pictures are there before, under another id",
        ),
        (
            lambda c: c["categories"][1].update(name="cat"),
            "categories [3, 7] are all called 'cat'",
        ),
    ],
)
def test_what_is_there_twice_is_told(
    files: Any, caplog: pytest.LogCaptureFixture, change: Change, told: str
) -> None:
    files.open()
    assert not caplog.records
    files.write(change)
    files.open()
    assert [told in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize(
    ("factors", "boxed", "told"),
    [
        ((1 / 40, 1 / 30), True, "the polygons fit as fractions of the picture. Write x and y"),
        ((1 / 40, 1 / 30), False, "all 3 polygons lie within one pixel: are they fractions"),
        ((2, 2), False, "2 of 3 polygons run over the right or bottom border: are they of pic"),
        ((1, 1), False, None),
    ],
)
def test_polygons_that_are_not_in_pixels_are_noticed(
    files: Any,
    caplog: pytest.LogCaptureFixture,
    factors: tuple[float, float],
    boxed: bool,
    told: str | None,
) -> None:
    def change(content: dict[str, Any]) -> None:
        for annotation in content["annotations"]:
            polygon = np.array(annotation["segmentation"][0]).reshape(-1, 2) * factors
            annotation["segmentation"] = [polygon.ravel().tolist()]
            if not boxed:
                del annotation["bbox"]

    files.write(change)
    files.open()
    assert [told is not None and told in r.getMessage() for r in caplog.records] == (
        [] if told is None else [True]
    )


def test_polygons_with_y_before_x_are_noticed(files: Any, caplog: pytest.LogCaptureFixture) -> None:
    def change(content: dict[str, Any]) -> None:
        for annotation in content["annotations"]:
            points = _pairs(annotation["segmentation"][0])
            annotation["segmentation"] = [[side for x, y in points for side in (y, x)]]

    files.write(change)
    files.open()
    assert "(or the masks have y before x)" in caplog.text
