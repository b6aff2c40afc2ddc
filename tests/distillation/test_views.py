"""What a student is shown depends on seed and number alone, and the truth fits the pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ptq4sam.data.scenes import write_scenes
from ptq4sam.distillation.pictures import Object, Photographs, Picture
from ptq4sam.distillation.settings import Sampling, Source
from ptq4sam.distillation.views import NEAR_POINTS, Batch, Views, view_of
from ptq4sam.errors import ConfigError, DataError
from tests.distillation.conftest import tiny_views
from tests.model.conftest import TINY_VARIANT


def test_a_view_depends_on_seed_and_number_alone() -> None:
    first, again, other = (tiny_views()[key] for key in ((1, 3), (1, 3), (0, 3)))
    assert torch.equal(first.pixels, again.pixels)
    assert torch.equal(first.boxes, again.boxes)
    assert torch.equal(first.points, again.points)
    assert first.pixels.shape != other.pixels.shape or not torch.equal(first.pixels, other.pixels)


def test_the_truth_fits_the_picture(batch: Batch) -> None:
    side, cells = 64, 32
    assert batch.target.shape == (len(batch.boxes), cells, cells)
    assert batch.owner.tolist() == sorted(batch.owner.tolist())
    assert (batch.boxes[:, 2:] > batch.boxes[:, :2]).all()
    assert batch.boxes.min() >= 0
    assert batch.boxes.max() <= side
    assert 0 <= batch.target.min() < batch.target.max() <= 1
    for seen, picture in zip(batch.seen, batch.pictures, strict=True):
        height, width = picture.shape[1:]
        assert max(height, width) <= side
        rows, columns = int(np.ceil(height / 2)), int(np.ceil(width / 2))
        assert seen[:rows, :columns].all()
        assert seen.sum() == rows * columns
    x, y = (batch.points / 2).long().clamp(max=cells - 1).unbind(-1)
    shares = torch.stack([t[v, u] for t, u, v in zip(batch.target, x, y, strict=True)])
    # Masks are coarser, so that they differ from the labels along outlines alone.
    assert ((shares >= 0.5) == (batch.labels > 0)).float().mean() > 0.9
    assert batch.labels[:, NEAR_POINTS:].mean() < batch.labels[:, :NEAR_POINTS].mean()


def test_a_small_object_keeps_its_outline() -> None:
    mask = np.zeros((400, 600), np.uint8)
    mask[101:104, 200:213] = 255
    picture = Picture(
        Image.new("RGB", (600, 400)), [Object((200.0, 101.0, 213.0, 104.0), lambda: mask)]
    )
    for index in range(40):
        view = view_of(picture, np.random.default_rng(index), (0.4, 0.4), 128, 64, 3)
        if view is None:
            continue
        inside = view.points[0][view.labels[0] > 0]
        sides = inside.amax(0) - inside.amin(0)
        assert 0.5 < float(sides[0] / sides[1]) / (13 / 3) < 2
        return
    raise AssertionError("no view shows the object")


def test_a_mirrored_picture_has_a_mirrored_truth() -> None:
    mask = np.zeros((100, 160), np.uint8)
    mask[20:60, 10:50] = 255
    white = Image.fromarray(np.repeat(mask[..., None], 3, axis=2))
    picture = Picture(white, [Object((10.0, 20.0, 50.0, 60.0), lambda: mask)])
    lefts = set()
    for index in range(6):
        view = view_of(picture, np.random.default_rng(index), (0.4, 0.4), 64, 32, 1)
        assert view is not None
        x, y = view.points[0].long().unbind(-1)
        bright = view.pixels[0, y.clamp(max=39), x] > 60
        assert (bright == (view.labels[0] > 0)).float().mean() > 0.95
        box = view.boxes[0].round().int()
        inside = view.target[0, box[1] // 2 : box[3] // 2, box[0] // 2 : box[2] // 2]
        assert inside.mean() > 0.95
        lefts.add(int(box[0]))
    assert lefts == {4, 44}


def test_photographs_are_drawn_by_weight_and_source(tmp_path: Path) -> None:
    images, annotations = write_scenes(tmp_path, 3, seed=0)
    content = json.loads(annotations.read_text())
    for image, name in zip(content["images"], ("one", "two", "two"), strict=True):
        image["source"] = name
    annotations.write_text(json.dumps(content))
    shown = Photographs([Source(images, annotations, 1.0, {"two": 0.0})])
    only = {np.asarray(shown.draw(np.random.default_rng(n)).image).tobytes() for n in range(6)}
    assert len(shown) == 3
    assert only == {Image.open(images / "000001.jpg").tobytes()}
    nothing = Source(images, annotations, 0.0)
    with pytest.raises(DataError, match="no picture with an object is ever shown"):
        Photographs([nothing])
    with pytest.raises(DataError, match="tow: no picture has that source; did you mean 'two'"):
        Photographs([Source(images, annotations, 1.0, {"tow": 0.0})])
    for image in content["images"]:
        image["id"] = str(image["id"])
    annotations.write_text(json.dumps(content))
    again = Photographs([Source(images, annotations, 1.0, {"two": 0.0})])
    assert np.asarray(again.draw(np.random.default_rng(0)).image).tobytes() in only
    with pytest.raises(ConfigError, match=r"weights: .* allowed: 0 or more each"):
        Source(images, annotations, 1.0, {"two": -1.0})


def test_damaged_photographs_alone_are_an_error_and_no_endless_search(tmp_path: Path) -> None:
    images, annotations = write_scenes(tmp_path, 2, seed=0)
    shown = Photographs([Source(images, annotations)], skip_bad=True)
    (images / "000001.jpg").write_bytes(b"no picture")
    drawn = [np.asarray(shown.draw(np.random.default_rng(n)).image) for n in range(4)]
    assert {pixels.tobytes() for pixels in drawn} == {Image.open(images / "000002.jpg").tobytes()}
    (images / "000002.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match="all 2 photographs that are shown are damaged"):
        shown.draw(np.random.default_rng(0))


def test_pictures_that_never_show_an_object_are_an_error(tmp_path: Path) -> None:
    images, annotations = write_scenes(tmp_path, 1, seed=0)
    content = json.loads(annotations.read_text())
    corner = [[0, 0, 2, 0, 2, 2, 0, 2]]
    small = {"bbox": [0, 0, 2, 2], "area": 4, "segmentation": corner}
    content["annotations"] = [{**content["annotations"][0], **small}]
    annotations.write_text(json.dumps(content))
    sampling = Sampling(scenes=0, smallest=0.1, largest=0.1)
    shown = Photographs([Source(images, annotations)])
    views = Views(shown, sampling, TINY_VARIANT.geometry, 32, seed=0)
    with pytest.raises(DataError, match="1000 pictures in a row showed no object of 3 pixels"):
        views[(0, 0)]
