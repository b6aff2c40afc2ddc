"""What else lies in folders of pictures, and pictures in folders of folders."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from PIL import Image

from ptq4sam.data import ImageFolder
from ptq4sam.errors import DataError

OTHERS = {
    "._a.png": b"\0\5\x16\7",
    ".DS_Store": b"\0",
    ".hidden.png": b"\0",
    "Thumbs.db": b"\0",
    "notes.pdf": b"%PDF-1.4",
    "list.txt": b"a.png",
    "weights.h5": b"\0",
    "film.mpg": b"\0\0\1\xb3",
    "drawing.eps": b"%!PS-Adobe",
}


def _picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3)).save(path)


@pytest.fixture
def folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Path:
    """Pictures a.png and b.jpg, nothing else; the log is listened to."""
    caplog.set_level(logging.INFO)
    for name in ("a.png", "b.jpg"):
        _picture(tmp_path / name)
    return tmp_path


def _names(images: ImageFolder) -> list[str]:
    return [images.file_name(record) for record in images.images]


def test_files_that_are_no_pictures_are_passed_over_with_one_note(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fingerprint = ImageFolder(folder).fingerprint()
    assert not caplog.records
    for name, content in OTHERS.items():
        (folder / name).write_bytes(content)
    images = ImageFolder(folder)
    assert _names(images) == ["a.png", "b.jpg"]
    assert [record.id for record in images.images] == [1, 2]
    assert images.fingerprint() == fingerprint
    (told,) = [record.getMessage() for record in caplog.records]
    assert f"not read as pictures: {len(OTHERS)} (.DS_Store, ._a.png, .hidden.png, ...)" in told


def test_what_has_a_pictures_name_and_is_none_is_still_told(folder: Path) -> None:
    (folder / "c.png").write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"image id 3: .*c\.png cannot be read"):
        ImageFolder(folder)


def test_subfolders_are_searched_if_asked(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("x/a.png", "x/y/c.png", ".cache/d.png", "__MACOSX/._a.png", "x/@eaDir/a.png"):
        _picture(folder / name)
    assert _names(ImageFolder(folder)) == ["a.png", "b.jpg"]
    assert "subfolders, which a recursive search reads: 1 (x)" in caplog.text
    caplog.clear()
    images = ImageFolder(folder, recursive=True)
    assert _names(images) == ["a.png", "b.jpg", "x/a.png", "x/y/c.png"]
    assert images.load(images.images[3]).shape == (3, 4, 3)
    assert not caplog.records
    before = images.fingerprint()
    (folder / "x" / "y" / "c.png").rename(folder / "x" / "c.png")
    assert ImageFolder(folder, recursive=True).fingerprint() != before


def test_a_link_to_a_folder_above_ends(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    _picture(elsewhere / "c.png")
    try:
        (folder / "x").mkdir()
        (folder / "x" / "above").symlink_to(folder)
        (folder / "x" / "linked").symlink_to(elsewhere)
    except OSError:
        pytest.skip("links cannot be made here")
    images = ImageFolder(folder, recursive=True)
    assert _names(images) == ["a.png", "b.jpg", "x/linked/c.png"]


def test_a_folder_without_pictures_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "notes.pdf").write_bytes(b"%PDF")
    _picture(tmp_path / "val" / "a.png")
    told = r"holds no picture; there are files .*: 1 \(notes\.pdf\); subfolders, .*: 1 \(val\)"
    with pytest.raises(DataError, match=told):
        ImageFolder(tmp_path)
