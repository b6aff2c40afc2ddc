"""Calibration's pictures one by one, from a server on this machine, and what is made of them."""

from __future__ import annotations

import dataclasses
import functools
import http.server
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from ptq4sam.cli import main
from ptq4sam.data import CocoDataset
from ptq4sam.downloads import ASSETS, Asset, State, asset_at, fetch_pictures, state_of
from ptq4sam.downloads.catalogue import CALIBRATION_PICTURES
from ptq4sam.errors import DataError, DownloadError

NAMED = 40
"""Pictures of the instances file; of these every tenth has no annotation."""


def picture(number: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (60 + number, 40), (number, 0, 0)).save(content, "JPEG")
    return content.getvalue()


def name(number: int) -> str:
    return f"{number:012d}.jpg"


@pytest.fixture
def published(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """The publisher's folder and its address."""
    folder = tmp_path / "published" / "train2017"
    folder.mkdir(parents=True)
    for number in range(NAMED):
        (folder / name(number)).write_bytes(picture(number))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_args: object) -> None:
            pass

    handler = functools.partial(Handler, directory=str(folder.parent))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}/train2017/"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with the instances file, whose pictures are not in the order of their names."""
    order = sorted(range(NAMED), key=lambda number: number * 7 % NAMED)
    annotated = [number for number in order if number % 10]
    box = {"bbox": [1, 1, 20, 20], "category_id": 1, "area": 400, "iscrowd": 0}
    content = {
        "images": [{"id": n, "file_name": name(n), "width": 60 + n, "height": 40} for n in order],
        # Written backwards: the order of the pictures counts.
        "annotations": [{"id": n + 1, "image_id": n, **box} for n in annotated[::-1]],
        "categories": [{"id": 1, "name": "thing"}],
    }
    assert ASSETS["coco-calibration"].of is not None
    path = tmp_path / "root" / ASSETS["coco-calibration"].of
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content))
    return tmp_path / "root"


def expected(root: Path) -> list[str]:
    content = json.loads((root / "data/coco/annotations/instances_train2017.json").read_text())
    return [image["file_name"] for image in content["images"] if image["id"] % 10][:32]


def served(url: str) -> Asset:
    return dataclasses.replace(ASSETS["coco-calibration"], url=url)


def test_the_first_annotated_pictures_and_no_more(published: tuple[Path, str], root: Path) -> None:
    asset = served(published[1])
    assert state_of(asset, root) is State.MISSING
    folder = fetch_pictures(asset, root, attempts=1, pause=0)
    assert folder == root / "data/coco/train2017"
    assert {path.name for path in folder.glob("*.jpg")} == set(expected(root))
    assert (root / asset.path).read_text().split() == expected(root)
    assert state_of(asset, root) is State.THERE
    (folder / expected(root)[3]).unlink()
    assert state_of(asset, root) is not State.THERE


def test_calibration_is_content_with_them(published: tuple[Path, str], root: Path) -> None:
    folder = fetch_pictures(served(published[1]), root, attempts=1, pause=0)
    annotations = root / "data/coco/annotations/instances_train2017.json"
    found = CocoDataset(folder, annotations, masks=False, enough=CALIBRATION_PICTURES)
    assert [record.path.name for record in found.images] == expected(root)
    # The same as with all pictures.
    every = CocoDataset(published[0], annotations, masks=False, enough=CALIBRATION_PICTURES)
    chosen = every.annotated_images()[:CALIBRATION_PICTURES]
    assert [record.path.name for record in chosen] == expected(root)
    assert len(every.images) == NAMED
    for enough in (CALIBRATION_PICTURES + 1, None):
        with pytest.raises(DataError, match="there is no image file"):
            CocoDataset(folder, annotations, masks=False, enough=enough)
    (folder / expected(root)[0]).unlink()
    with pytest.raises(DataError, match="there is no image file"):
        CocoDataset(folder, annotations, masks=False, enough=CALIBRATION_PICTURES)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (picture(3)[:300], "no whole JPEG"),
        (b"<html>", "no whole JPEG"),
        (picture(39), "it has 99 x 40 pixels, not"),
    ],
)
def test_another_picture_than_the_annotations_say(
    content: bytes, problem: str, published: tuple[Path, str], root: Path
) -> None:
    wrong = expected(root)[5]
    right = (published[0] / wrong).read_bytes()
    (published[0] / wrong).write_bytes(content)
    asset = served(published[1])
    with pytest.raises(DownloadError, match=f"{wrong}.*{problem}"):
        fetch_pictures(asset, root, attempts=1, pause=0)
    assert not (root / "data/coco/train2017" / wrong).exists()
    assert state_of(asset, root) is not State.THERE
    # What was there before, but damaged, is fetched anew.
    (published[0] / wrong).write_bytes(right)
    (root / "data/coco/train2017" / wrong).write_bytes(content)
    fetch_pictures(asset, root, attempts=1, pause=0)
    assert (root / "data/coco/train2017" / wrong).read_bytes() == right


def test_which_download_is_named() -> None:
    train = Path("data/coco/train2017")
    names = [found.name for enough in (32, 33, None) if (found := asset_at(train, enough))]
    assert names == ["coco-calibration", "coco-train", "coco-train"]
    val = asset_at(Path("data/coco/val2017"), 32)
    assert val is not None
    assert val.name == "coco-val"


def test_the_annotations_come_first(
    root: Path, published: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def get(asset: Asset, *_: object) -> Path:
        asked.append(asset.name)
        return root

    monkeypatch.setattr("ptq4sam.downloads.terminal._get", get)
    assert main(["download", "coco-calibration", "--root", str(root.parent)]) == 0
    assert asked == ["coco-annotations", "coco-calibration"]
