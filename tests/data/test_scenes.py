from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from ptq4sam.data.scene_shapes import SHAPES
from ptq4sam.data.scenes import (
    MINIMUM_VISIBLE_AREA,
    SCENE_CATEGORIES,
    Scene,
    generate_scene,
    write_scenes,
)
from ptq4sam.errors import DataError


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [generate_scene(seed) for seed in range(60)]


def _contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_a_seed_gives_the_same_scene_and_another_seed_another() -> None:
    first, again, other = generate_scene(7), generate_scene(7), generate_scene(8)
    assert np.array_equal(first.image, again.image)
    assert all(
        np.array_equal(a.mask, b.mask) and a.category == b.category
        for a, b in zip(first.instances, again.instances, strict=True)
    )
    assert not np.array_equal(first.image, other.image)


def test_a_generator_may_stand_for_the_seed() -> None:
    drawn = generate_scene(np.random.default_rng(7))
    assert np.array_equal(drawn.image, generate_scene(7).image)


@pytest.mark.parametrize(("width", "height"), [(320, 256), (256, 256), (97, 130)])
def test_size_is_what_was_asked_for(width: int, height: int) -> None:
    scene = generate_scene(3, width, height)
    assert scene.image.shape == (height, width, 3)
    assert scene.image.dtype == np.uint8
    assert scene.instances
    assert all(item.mask.shape == (height, width) for item in scene.instances)


def test_too_small_a_picture_is_refused() -> None:
    with pytest.raises(DataError, match="32 x 256"):
        generate_scene(0, 32, 256)


def test_masks_are_visible_parts_with_tight_boxes(scenes: list[Scene]) -> None:
    for scene in scenes:
        covered = np.zeros(scene.image.shape[:2], dtype=int)
        for item in scene.instances:
            covered += item.mask
            x0, y0, x1, y1 = item.box.astype(int)
            inside = item.mask[y0:y1, x0:x1]
            assert item.mask.sum() == inside.sum() >= MINIMUM_VISIBLE_AREA
            assert inside[0].any()
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()
        assert covered.max() <= 1


def test_scenes_are_cluttered_and_of_every_category_and_size(scenes: list[Scene]) -> None:
    counts = [len(scene.instances) for scene in scenes]
    assert max(counts) <= 16
    assert np.mean(counts) > 8
    seen = Counter(item.category for scene in scenes for item in scene.instances)
    assert set(seen) == set(range(len(SCENE_CATEGORIES)))
    areas = np.array([item.mask.sum() for scene in scenes for item in scene.instances])
    assert (areas < 32**2).mean() > 0.2
    assert ((areas >= 32**2) & (areas < 96**2)).mean() > 0.3
    assert (areas >= 96**2).mean() > 0.02


def test_a_filled_box_is_a_poor_mask(scenes: list[Scene]) -> None:
    fills = [
        item.mask.sum() / np.prod(item.box[2:] - item.box[:2])
        for scene in scenes
        for item in scene.instances
    ]
    assert np.mean(fills) < 0.6


def test_objects_differ_from_what_surrounds_them(scenes: list[Scene]) -> None:
    """An object's mean colour is seldom that of the rest of its box."""
    differences = []
    for scene in scenes:
        for item in scene.instances:
            x0, y0, x1, y1 = item.box.astype(int)
            mask = item.mask[y0:y1, x0:x1]
            if mask.all():
                continue
            patch = scene.image[y0:y1, x0:x1].astype(float)
            gap = patch[mask].mean(axis=0) - patch[~mask].mean(axis=0)
            differences.append(np.sqrt(np.mean(gap**2)))
    assert np.mean(np.array(differences) > 20) > 0.85


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_fill_their_unit_frame(name: str) -> None:
    for seed in range(20):
        shape = SHAPES[name](np.random.default_rng(seed))
        points = np.concatenate(shape.parts)
        assert np.isfinite(points).all()
        assert np.abs(points).max() < 1.35
        assert np.abs(points).max() > 0.8


def test_data_set_reads_back_as_the_scenes_it_was_written_from(tmp_path: Path) -> None:
    images, annotations = write_scenes(tmp_path, 4, seed=5, split="val")
    truth = COCO(annotations)
    assert [category["name"] for category in truth.dataset["categories"]] == [*SCENE_CATEGORIES]
    assert len(list(images.iterdir())) == len(truth.dataset["images"]) == 4
    for record in truth.dataset["images"]:
        with Image.open(images / record["file_name"]) as picture:
            assert picture.size == (record["width"], record["height"])
        for annotation in truth.imgToAnns[record["id"]]:
            mask = truth.annToMask(annotation)
            assert mask.sum() == annotation["area"]
            x, y, width, height = (int(side) for side in annotation["bbox"])
            assert mask[y : y + height, x : x + width].sum() == annotation["area"]


def test_data_set_is_the_same_byte_for_byte_and_grows_with_its_count(tmp_path: Path) -> None:
    write_scenes(tmp_path / "a", 3, seed=5)
    write_scenes(tmp_path / "b", 3, seed=5)
    write_scenes(tmp_path / "more", 4, seed=5)
    write_scenes(tmp_path / "other", 3, seed=5, split="train")
    first = _contents(tmp_path / "a")
    assert first == _contents(tmp_path / "b")
    more = _contents(tmp_path / "more")
    pictures = [name for name in first if name.endswith(".jpg")]
    assert len(pictures) == 3
    assert all(first[name] == more[name] for name in pictures)
    other = _contents(tmp_path / "other")
    assert not set(first.values()) & set(other.values())


def test_an_interrupted_write_leaves_no_annotations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(json, "dumps", fail)
    with pytest.raises(OSError, match="disk full"):
        write_scenes(tmp_path, 1, seed=5)
    assert not list((tmp_path / "annotations").iterdir())


def test_an_empty_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="0 were asked for"):
        write_scenes(tmp_path, 0, seed=1)
