from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from ptq4sam.data import CocoDataset
from ptq4sam.data.scenes import write_scenes
from ptq4sam.errors import DataError
from ptq4sam.evaluation import BoxScores, MaskScores

Change = Callable[[dict[str, Any]], object]


def test_records_are_in_file_order_with_their_sizes(files: Any) -> None:
    dataset = files.open()
    assert [(r.id, r.path.name, r.width, r.height) for r in dataset.images] == [
        (10, "a.jpg", 40, 30),
        (11, "b.jpg", 40, 30),
        (12, "c.jpg", 40, 30),
    ]
    assert dataset.category_ids == [3, 7]
    assert dataset.category_names == {3: "cat", 7: "dog"}
    assert dataset.load(dataset.images[0]).shape == (30, 40, 3)
    assert [r.id for r in dataset.annotated_images()] == [10, 12]
    assert not dataset.skipped


def test_instances_have_boxes_and_masks(files: Any) -> None:
    dataset = files.open()
    cat, dog = dataset.instances(dataset.images[0])
    assert (cat.annotation_id, cat.category_id, cat.iscrowd, cat.area) == (1, 3, False, 80.0)
    assert cat.box.tolist() == [4, 5, 14, 13]
    assert cat.box.dtype == np.float32
    expected = np.zeros((30, 40), np.bool_)
    expected[5:13, 4:14] = True
    assert np.array_equal(cat.mask, expected)
    assert dog.category_id == 7
    assert dataset.instances(dataset.images[1]) == []


def test_masks_are_those_of_pycocotools_whatever_their_encoding(tmp_path: Path) -> None:
    images, annotations = write_scenes(tmp_path, 3, seed=4)
    dataset, reference = CocoDataset(images, annotations), COCO(annotations)
    compared = 0
    for record in dataset.images:
        for item in dataset.instances(record):
            expected = reference.annToMask(reference.anns[item.annotation_id])
            assert np.array_equal(item.mask, expected.astype(bool))
            compared += 1
    assert compared > 10


def test_uncompressed_runs_and_crowds(files: Any) -> None:
    runs = {"size": [30, 40], "counts": [30 * 2, 30 * 3, 30 * 35]}
    crowd = files.annotation(9, 11, [2, 0, 3, 30], segmentation=runs, iscrowd=1)
    dataset = files.write(lambda c: c["annotations"].append(crowd)).open()
    (item,) = dataset.instances(dataset.images[1])
    assert item.iscrowd
    assert np.flatnonzero(item.mask.all(axis=0)).tolist() == [2, 3, 4]
    assert item.mask.sum() == 90
    assert [r.id for r in dataset.annotated_images()] == [10, 11, 12]


def test_what_can_be_derived_may_be_left_out(files: Any) -> None:
    def change(content: dict[str, Any]) -> None:
        for key in ("iscrowd", "area", "bbox"):
            del content["annotations"][0][key]

    item = files.write(change).open().instances(files.open().images[0])[0]
    assert not item.iscrowd
    assert item.area == 80.0
    assert item.box.tolist() == [4, 5, 14, 13]


def test_null_counts_as_not_there(files: Any) -> None:
    def change(content: dict[str, Any]) -> None:
        content["annotations"][0].update(iscrowd=None, area=None, bbox=None, score=None)
        content["images"][0].update(license=None)

    dataset = files.write(change).open()
    item = dataset.instances(dataset.images[0])[0]
    assert (item.iscrowd, item.area, item.box.tolist()) == (False, 80.0, [4, 5, 14, 13])
    assert len(dataset.ground_truth.anns) == 3
    assert files.write(lambda c: c.update(annotations=None)).open().annotated_images() == []


@pytest.mark.parametrize("number", [float, str])
def test_whole_numbers_may_be_written_otherwise(
    files: Any, number: Callable[[int], object], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    def change(content: dict[str, Any]) -> None:
        for key, fields in (
            ("images", ("id", "width", "height")),
            ("categories", ("id",)),
            ("annotations", ("id", "image_id", "category_id", "iscrowd")),
        ):
            for entry in content[key]:
                entry.update({field: number(entry[field]) for field in fields})

    plain = files.open()
    dataset = files.write(change).open()
    assert dataset.images == plain.images
    assert dataset.category_names == plain.category_names
    assert dataset.ground_truth.anns == plain.ground_truth.anns
    notes = [record.getMessage() for record in caplog.records]
    assert notes == ([] if number is float else [notes[0]])
    assert all("numbers are written as text" in note for note in notes)


def test_gzip_and_byte_order_marks(files: Any) -> None:
    text = json.dumps(files.content)
    for written in (
        gzip.compress(text.encode()),
        text.encode("utf-8-sig"),
        text.encode("utf-16"),
    ):
        files.annotations.write_bytes(written)
        assert len(files.open().images) == 3
    compressed = files.annotations.with_suffix(".json.gz")
    compressed.write_bytes(gzip.compress(text.encode())[:-9])
    with pytest.raises(
        DataError, match=r"instances\.json\.gz is a damaged gzip file: .+"
    ) as caught:
        CocoDataset(files.images, compressed)
    assert "\n" not in str(caught.value)


def test_a_missing_size_is_read_from_the_picture(
    files: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(files.images / "b.jpg", exif=exif)

    def change(content: dict[str, Any]) -> None:
        del content["images"][0]["width"], content["images"][1]["height"]
        content["images"][1]["width"] = None

    dataset = files.write(change).open()
    assert [(r.width, r.height) for r in dataset.images] == [(40, 30), (30, 40), (40, 30)]
    for record in dataset.images:
        assert dataset.load(record).shape == (record.height, record.width, 3)
    assert "width and height of 2 pictures are missing" in caplog.text
    (files.images / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"image id 10: .*a\.jpg cannot be read.*skip what is bad"):
        files.open()
    lenient = files.open(skip_bad=True)
    assert [r.id for r in lenient.images] == [11, 12]
    assert lenient.skipped == {"damaged image": 1}


@pytest.mark.parametrize(
    "flat", [[5, 5], [5, 5] * 3, [2, 5, 20, 5, 9, 5], [2, 3, 4, 6, 8, 12], [1, 2, 3, 4]]
)
def test_a_flat_polygon_costs_itself_and_not_the_object(
    files: Any, flat: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    whole = [item.mask for item in files.open().instances(files.open().images[0])]
    dataset = files.write(lambda c: c["annotations"][0]["segmentation"].insert(0, flat)).open()
    items = dataset.instances(dataset.images[0])
    assert all(np.array_equal(item.mask, mask) for item, mask in zip(items, whole, strict=True))
    assert "dropped 1 polygons" in caplog.text
    assert not dataset.skipped
    caplog.clear()
    dataset = files.write(lambda c: c["annotations"][0].update(segmentation=[flat, flat])).open()
    assert [item.annotation_id for item in dataset.instances(dataset.images[0])] == [2]
    assert dataset.skipped == {"annotation of flat polygons": 1}
    told = [record.getMessage() for record in caplog.records if record.levelname == "INFO"]
    assert any("skipped 1 x annotation of flat polygons" in line for line in told)
    assert len(told) == len(caplog.records) == 2


@pytest.mark.parametrize(
    "polygon",
    [
        [4, 4, 14, 14, 14, 4, 4, 14],  # Its signed areas cancel out.
        [4, 4, 14, 4, 14, 14],
        [4, 4, 14, 14, 14, 4],
        [4, 4, 4, 4, 9, 4, 14, 4, 4, 14],
    ],
)
def test_what_encloses_something_is_not_flat(files: Any, polygon: list[float]) -> None:
    dataset = files.write(lambda c: c["annotations"][0].update(segmentation=[polygon])).open()
    item, _ = dataset.instances(dataset.images[0])
    assert item.mask.sum() > 30


@pytest.mark.parametrize("segmentation", ["missing", None, [], [[]], [[5, 5]], "text"])
def test_without_need_of_masks_a_box_is_enough(files: Any, segmentation: Any) -> None:
    def change(content: dict[str, Any]) -> None:
        content["annotations"][0].update(segmentation=segmentation, area=None)
        if segmentation == "missing":
            del content["annotations"][0]["segmentation"]

    dataset = files.write(change).open(masks=False)
    boxed, masked = dataset.instances(dataset.images[0])
    assert (boxed.segmentation, boxed.area) == (None, 80.0)
    assert boxed.box.tolist() == [4, 5, 14, 13]
    assert masked.mask.sum() == 12 * 15
    with pytest.raises(DataError, match="annotation id 1 has a box and no mask"):
        _ = boxed.mask
    with pytest.raises(DataError, match=r"annotation id 1 of .*a\.jpg\): scores need its mask"):
        dataset.require_masks()
    with pytest.raises(DataError, match="scores need its mask"):
        MaskScores(dataset).summarize()
    BoxScores(dataset).summarize()
    files.open(masks=False).subset(dataset.images[1:]).require_masks()
    assert not dataset.skipped


def test_without_box_and_mask_there_is_nothing_to_use(files: Any) -> None:
    def change(content: dict[str, Any]) -> None:
        content["annotations"][0].update(segmentation=None, bbox=None)

    files.write(change)
    for masks in (True, False):
        with pytest.raises(DataError, match=r"annotation id 1 .*: there is no segmentation"):
            files.open(masks=masks)
        lenient = files.open(masks=masks, skip_bad=True)
        assert lenient.skipped == {"annotation without segmentation": 1}


def test_boxes_that_contradict_their_masks_are_counted(
    files: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def corners(content: dict[str, Any]) -> None:
        for annotation in content["annotations"]:
            x, y, w, h = annotation["bbox"]
            annotation["bbox"] = [x, y, x + w, y + h]

    def fractions(content: dict[str, Any]) -> None:
        for annotation in content["annotations"]:
            x1, y1, x2, y2 = annotation["bbox"]
            annotation["bbox"] = [x1 / 40, y1 / 30, (x2 - x1) / 40, (y2 - y1) / 30]

    before = files.open()
    assert not caplog.records
    dataset = files.write(corners).open()
    (told,) = [record.getMessage() for record in caplog.records]
    assert "2 of 3 boxes contradict their masks, first that of annotation id 1: they fit as" in told
    assert "[x1, y1, x2, y2] (xyxy)" in told
    for one, other in zip(before.images, dataset.images, strict=True):
        areas = [[i.area for i in d.instances(r)] for d, r in ((before, one), (dataset, other))]
        assert areas[0] == areas[1]
    caplog.clear()
    files.write(fractions).open()
    (told,) = [record.getMessage() for record in caplog.records]
    assert "3 of 3 boxes contradict" in told
    assert "fractions [x, y, width, height]" in told


def test_boxes_without_masks_are_looked_at_too(
    files: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def change(content: dict[str, Any]) -> None:
        for annotation in content["annotations"]:
            annotation.update(segmentation=[], bbox=[20, 15, 35, 25])

    files.write(change).open(masks=False)
    (told,) = [record.getMessage() for record in caplog.records]
    assert "3 of 3 boxes run over the right or bottom border" in told
    assert "xyxy" in told


def test_annotations_of_a_stored_and_of_a_turned_picture(files: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(files.images / "a.jpg", exif=exif)
    stored = files.open()
    assert stored.load(stored.images[0]).shape == (30, 40, 3)
    turned = files.write(lambda c: c["images"][0].update(width=30, height=40)).open()
    assert turned.load(turned.images[0]).shape == (40, 30, 3)
    other = files.write(lambda c: c["images"][0].update(width=31, height=40)).open()
    with pytest.raises(DataError, match=r"image id 10: .*a\.jpg has 40x30 .* 31x40"):
        other.load(other.images[0])


def test_a_turned_picture_whose_size_tells_nothing_is_noted(
    files: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for orientation, told in ((3, 1), (6, 0), (1, 0)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for name in ("a.jpg", "b.jpg"):
            Image.new("RGB", (40, 30)).save(files.images / name, exif=exif)
        dataset = files.open()
        for record in dataset.images:
            dataset.load(record)
        assert caplog.text.count("is turned as its EXIF orientation says") == told
        caplog.clear()


def test_pictures_in_subfolders_and_a_test_set_without_annotations(files: Any) -> None:
    (files.images / "sub").mkdir()
    (files.images / "a.jpg").rename(files.images / "sub" / "a.jpg")

    def change(content: dict[str, Any]) -> None:
        content["images"][0]["file_name"] = "sub/a.jpg"
        del content["annotations"]

    dataset = files.write(change).open()
    assert dataset.load(dataset.images[0]).shape == (30, 40, 3)
    assert dataset.annotated_images() == []


def test_the_limit_leaves_no_other_annotations(files: Any) -> None:
    dataset = files.open(limit=2)
    assert sorted(dataset.ground_truth.imgs) == [10, 11]
    assert {a["image_id"] for a in dataset.ground_truth.anns.values()} == {10}


def test_the_fingerprint_follows_the_annotations_and_not_the_limit(files: Any) -> None:
    before = files.open().fingerprint()
    assert files.open(limit=1).fingerprint() == before
    moved = files.annotations.with_name("moved.json")
    moved.write_bytes(files.annotations.read_bytes())
    assert CocoDataset(files.images, moved).fingerprint() == before
    assert files.write(lambda c: c["annotations"].pop()).open().fingerprint() != before


def test_nothing_is_printed(files: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert files.open().ground_truth.imgs
    assert capsys.readouterr().out == ""


def test_real_photographs(shared_dir: Path) -> None:
    root = shared_dir / "data" / "coco_mini"
    dataset = CocoDataset(root / "images" / "val2017", root / "annotations" / "instances_val.json")
    expected = json.loads((root / "annotations" / "instances_val.json").read_bytes())
    assert len(dataset.images) == 100
    assert sum(len(dataset.instances(r)) for r in dataset.images) == len(expected["annotations"])
    for record in dataset.images[:10]:
        assert dataset.load(record).shape == (record.height, record.width, 3)
