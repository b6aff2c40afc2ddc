"""Pictures by names that are not quite those of their files."""

from __future__ import annotations

import logging
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from ptq4sam.data.file_names import PictureFinder, named_file
from ptq4sam.errors import DataError

COMPOSED = unicodedata.normalize("NFC", "caf\u00e9.jpg")
DECOMPOSED = unicodedata.normalize("NFD", COMPOSED)


def _files(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("a.png", "a.png"),
        ("x/a.png", "x/a.png"),
        ("x\\y\\a.png", "x/y/a.png"),
        ("./x//a.png", "x/a.png"),
        ("a.JPG", "a.jpg"),
        ("a.jpg", "A.JPG"),
        (COMPOSED, DECOMPOSED),
        (DECOMPOSED, COMPOSED),
        (f"{DECOMPOSED}s/a.png", f"{COMPOSED}s/a.png"),
        ("img/a.png", "a.png"),
        ("data/img/a.png", "a.png"),
        ("val2017/a.png", "val2017/a.png"),
        ("val2017/a.png", "a.png"),
        ("C:\\Users\\me\\a.PNG", "a.png"),
        ("/home/me/data/x/a.png", "x/a.png"),
        ("../elsewhere/a.png", "a.png"),
        ("a", "a.png"),
        ("COCO_val2014_a.png", "a.png"),
        ("val2014/COCO_val2014_a.png", "a.png"),
        ("a.v2", "a.v2.png"),
        ("x/a", "x/a.png"),
        (" a.png ", "a.png"),
    ],
)
def test_a_picture_is_found_by_a_name_like_its_own(tmp_path: Path, name: str, file: str) -> None:
    folder = _files(tmp_path / "data" / "img", file, "b.png")
    finder = PictureFinder(folder, [name, "b.png"])
    found = finder.find(name)
    assert found is not None
    assert found.samefile(folder / file)
    assert finder.find("b.png") == folder / "b.png"
    assert "b.png" not in finder.renamed
    assert finder.find("c.png") is None


def test_what_could_mean_two_pictures_means_none(tmp_path: Path) -> None:
    folder = _files(tmp_path / "train", "a.png", "c.jpg", "C.jpg")
    if len(list(folder.iterdir())) < 3:
        pytest.skip("names that differ in case alone are one file here")
    names = ["train/a.png", "val/a.png", "b/a.png", "c.JPG", "A.png", "c"]
    finder = PictureFinder(folder, names)
    # Only the first is told by the folder that it lies in; two files may be the fourth.
    assert finder.find("train/a.png") == folder / "a.png"
    assert finder.find("val/a.png") is None
    assert finder.find("b/a.png") is None
    assert finder.find("c.JPG") is None
    assert finder.find("c") is None


def test_the_exact_name_goes_first(tmp_path: Path) -> None:
    folder = _files(tmp_path / "img", "img/a.png", "a.png", "b.PNG", "b.png")
    finder = PictureFinder(folder, ["img/a.png", "b.PNG"])
    assert finder.find("img/a.png") == folder / "img" / "a.png"
    assert finder.find("b.PNG") == folder / "b.PNG"
    assert not finder.renamed


def test_lvis_names_its_pictures_by_url(files: Any, caplog: pytest.LogCaptureFixture) -> None:
    """As version 1, whose val has pictures of train2017 too."""
    caplog.set_level(logging.INFO)
    base = "http://images.cocodataset.org"

    def change(content: dict[str, Any]) -> None:
        for entry, split in zip(
            content["images"], ("train2017", "val2017", "val2017"), strict=True
        ):
            entry["coco_url"] = f"{base}/{split}/{entry.pop('file_name')}"
        content["images"][1]["file_name"] = None

    dataset = files.write(change).open()
    assert [record.path.name for record in dataset.images] == ["a.jpg", "b.jpg", "c.jpg"]
    (told,) = [record.getMessage() for record in caplog.records]
    assert "3 of 3 file names are not quite those of the files; the first, train2017/a.jpg," in told
    caplog.clear()
    for name, split in (("a.jpg", "train2017"), ("b.jpg", "val2017"), ("c.jpg", "val2017")):
        (files.images / split).mkdir(exist_ok=True)
        (files.images / name).rename(files.images / split / name)
    dataset = files.open()
    assert dataset.load(dataset.images[0]).shape == (30, 40, 3)
    assert not caplog.records


def test_which_name_an_entry_has() -> None:
    url = "https://h/val2017/a%20b.jpg?download=1"
    assert named_file({"file_name": "c.jpg", "coco_url": url}) == "c.jpg"
    assert named_file({"file_name": "", "coco_url": url}) == "val2017/a b.jpg"
    assert named_file({"coco_url": "val2017/a.jpg"}) == "val2017/a.jpg"
    assert named_file({"coco_url": "http://[h/a.jpg"}) == "a.jpg"
    assert named_file({}) is None
    assert named_file({"file_name": url, "coco_url": "http://h/c.jpg"}) == "val2017/a b.jpg"


def test_a_picture_in_another_format_is_named_and_not_taken(files: Any) -> None:
    """It may be a mask of the picture."""
    (files.images / "b.jpg").rename(files.images / "b.png")
    with pytest.raises(DataError, match=r"there is .*images.b\.png: correct its file_name"):
        files.open()


def test_a_missing_picture_that_lies_nearby(files: Any) -> None:
    """In a folder of the folder, or in one beside it."""
    (files.images / "val").mkdir()
    (files.images / "b.jpg").rename(files.images / "val" / "b.jpg")
    with pytest.raises(DataError, match=r"there is .*val.b\.jpg: give .*images.val; repair"):
        files.open()

    def change(content: dict[str, Any]) -> None:
        for entry, split in zip(content["images"], ("train", "val", "train"), strict=True):
            entry["file_name"] = f"{split}/{entry['file_name']}"

    (files.images / "train").mkdir()
    (files.images / "a.jpg").rename(files.images / "train" / "a.jpg")
    files.write(change)
    files.images = files.images / "val"
    with pytest.raises(DataError, match=r"id 10: .*there is .*train.a\.jpg: give .*images \(and 1"):
        files.open()
