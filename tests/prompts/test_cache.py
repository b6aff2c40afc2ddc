from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ptq4sam.data import CocoDataset, ImageRecord
from ptq4sam.prompts import CachedPrompts, GroundTruth, Prompts, cached


class CountingSource:
    """Random boxes, counting how often it is asked."""

    name = "counting source"

    def __init__(self, version: str = "1") -> None:
        self.version = version
        self.asked = 0

    def fingerprint(self) -> str:
        return self.version

    def prompts(self, record: ImageRecord, image: NDArray[np.uint8]) -> Prompts:
        self.asked += 1
        rng = np.random.default_rng(record.id)
        boxes = np.sort(rng.random((7, 4)).astype(np.float32) * 200, axis=1)
        return Prompts(record.id, boxes, rng.random(7).astype(np.float32), rng.integers(1, 5, 7))


def _walk(source: CountingSource, dataset: CocoDataset, folder: Path) -> list[Prompts]:
    cache = cached(source, dataset, folder)
    return [cache.prompts(record, dataset.load(record)) for record in dataset.images]


def _same(first: Prompts, second: Prompts) -> bool:
    return (
        first.image_id == second.image_id
        and np.array_equal(first.boxes, second.boxes)
        and np.array_equal(first.scores, second.scores)
        and np.array_equal(first.category_ids, second.category_ids)
    )


def test_boxes_are_found_once_and_come_back_bit_for_bit(
    scenes: CocoDataset, tmp_path: Path
) -> None:
    source, later = CountingSource(), CountingSource()
    first, second = _walk(source, scenes, tmp_path), _walk(later, scenes, tmp_path)
    assert (source.asked, later.asked) == (3, 0)
    assert all(_same(a, b) for a, b in zip(first, second, strict=True))
    assert second[0].boxes.dtype == np.float32
    assert second[0].category_ids.dtype == np.int64


def test_no_boxes_are_remembered_too(scenes: CocoDataset, tmp_path: Path) -> None:
    class Empty(CountingSource):
        def prompts(self, record: ImageRecord, image: NDArray[np.uint8]) -> Prompts:
            return super().prompts(record, image).first(0)

    assert [len(p) for p in _walk(Empty(), scenes, tmp_path)] == [0, 0, 0]
    later = Empty()
    assert [len(p) for p in _walk(later, scenes, tmp_path)] == [0, 0, 0]
    assert later.asked == 0


def test_another_source_or_data_set_is_asked_anew(scenes: CocoDataset, tmp_path: Path) -> None:
    _walk(CountingSource(), scenes, tmp_path)
    other = CountingSource("2")
    _walk(other, scenes, tmp_path)
    assert other.asked == 3
    copied = tmp_path / "other.json"
    copied.write_text(scenes.path.read_text() + "\n")
    source = CountingSource()
    _walk(source, CocoDataset(scenes.images[0].path.parent, copied), tmp_path)
    assert source.asked == 3


def test_a_part_of_the_data_set_shares_the_cache(scenes: CocoDataset, tmp_path: Path) -> None:
    part = CocoDataset(scenes.images[0].path.parent, scenes.path, limit=2)
    _walk(CountingSource(), part, tmp_path)
    source = CountingSource()
    _walk(source, scenes, tmp_path)
    assert source.asked == 1


def test_a_changed_picture_is_asked_anew(scenes: CocoDataset, tmp_path: Path) -> None:
    source = CountingSource()
    cache, record = cached(source, scenes, tmp_path), scenes.images[0]
    image = scenes.load(record)
    cache.prompts(record, image)
    image[0, 0, 0] ^= 1
    cache.prompts(record, image)
    cache.prompts(record, image)
    assert source.asked == 2


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"pixels": "x"',
        "{}",
        '{"pixels": PIXELS}',
        '{"pixels": PIXELS, "boxes": [[1, 2]], "scores": [1], "category_ids": [1]}',
        '{"pixels": PIXELS, "boxes": [[1, 2, 3, NaN]], "scores": [1], "category_ids": [1]}',
        '{"pixels": PIXELS, "boxes": [[1, 2, 3, 4]], "scores": ["a"], "category_ids": [1]}',
        "\udcff",
    ],
)
def test_a_damaged_file_is_found_anew_with_a_warning(
    scenes: CocoDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    expected = _walk(CountingSource(), scenes, tmp_path)
    (path,) = tmp_path.rglob("2.json")
    pixels = path.read_text().partition('"pixels": ')[2].partition(",")[0]
    path.write_bytes(content.replace("PIXELS", pixels).encode(errors="surrogateescape"))
    source = CountingSource()
    found = _walk(source, scenes, tmp_path)
    assert source.asked == 1
    assert all(_same(a, b) for a, b in zip(found, expected, strict=True))
    assert "2.json are damaged" in caplog.text
    again = CountingSource()
    _walk(again, scenes, tmp_path)
    assert again.asked == 0


def test_nothing_but_finished_files_is_left(scenes: CocoDataset, tmp_path: Path) -> None:
    _walk(CountingSource(), scenes, tmp_path)
    (folder,) = tmp_path.iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["1.json", "2.json", "3.json"]


def test_what_costs_nothing_is_not_kept(scenes: CocoDataset, tmp_path: Path) -> None:
    truth = GroundTruth(scenes)
    assert cached(truth, scenes, tmp_path) is truth
    assert isinstance(cached(CountingSource(), scenes, tmp_path), CachedPrompts)


def test_cached_boxes_need_no_detector(scenes: CocoDataset, tmp_path: Path) -> None:
    """Neither onnxruntime nor torchvision is imported where the cache has everything."""
    weights = tmp_path / "detector.onnx"
    weights.write_bytes(b"never opened")
    script = f"""
import sys
from pathlib import Path
from ptq4sam.data import CocoDataset
from ptq4sam.prompts import CachedPrompts, Prompts, open_prompts
from ptq4sam.prompts.cache import cached
from ptq4sam.evaluation import MaskScores
dataset = CocoDataset(Path({str(scenes.images[0].path.parent)!r}), Path({str(scenes.path)!r}))
for spec in ("onnx:{weights}", "torchvision:fasterrcnn_resnet50_fpn:{weights}"):
    source = open_prompts(spec, dataset)
    found = source.prompts
    source.prompts = lambda record, image: Prompts(record.id, [[1, 2, 3, 4]], [1], [1])
    cached(source, dataset, Path({str(tmp_path)!r})).prompts(
        dataset.images[0], dataset.load(dataset.images[0]))
    again = cached(open_prompts(spec, dataset), dataset, Path({str(tmp_path)!r}))
    assert len(again.prompts(dataset.images[0], dataset.load(dataset.images[0]))) == 1
loaded = {{"onnxruntime", "torchvision"}} & set(sys.modules)
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
