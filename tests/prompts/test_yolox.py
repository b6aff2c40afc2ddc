from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ptq4sam.data import CocoDataset, ImageRecord
from ptq4sam.errors import CheckpointError, DependencyError
from ptq4sam.evaluation import BoxScores
from ptq4sam.prompts import CocoResults, YoloxOnnx
from ptq4sam.prompts.categories import COCO_CATEGORY_IDS
from ptq4sam.prompts.yolox import letterbox

SIDE = 64
CELLS = 8 * 8 + 4 * 4 + 2 * 2

Rows = dict[int, list[float]]
WriteModel = Callable[..., Path]


@pytest.fixture
def write_model(tmp_path: Path) -> WriteModel:
    """Writes a detector for 64x64 pixels that sees the given rows in every picture."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper, numpy_helper

    def write(
        rows: Rows, classes: int = 80, cells: int = CELLS, shape: tuple[object, ...] | None = None
    ) -> Path:
        output = np.zeros((1, cells, 5 + classes), np.float32)
        for cell, row in rows.items():
            output[0, cell, : len(row)] = row
        graph = helper.make_graph(
            [
                helper.make_node("ReduceMax", ["images"], ["top"], keepdims=0),
                helper.make_node("Mul", ["top", "zero"], ["nothing"]),
                helper.make_node("Add", ["rows", "nothing"], ["output"]),
            ],
            "constant",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape or (1, 3, 64, 64))],
            [helper.make_tensor_value_info("output", TensorProto.FLOAT, output.shape)],
            [
                numpy_helper.from_array(output, "rows"),
                numpy_helper.from_array(np.zeros((), np.float32), "zero"),
            ],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        path = tmp_path / "detector.onnx"
        onnx.save(model, path)
        return path

    return write


def _row(
    box: tuple[float, float, float, float],
    column: int,
    line: int,
    stride: int,
    label: int,
    objectness: float = 1.0,
    probability: float = 0.5,
) -> list[float]:
    """What YOLOX gives in a cell for a box x0, y0, x1, y1 in pixels of its input."""
    x0, y0, x1, y1 = box
    centre = [(x0 + x1) / 2 / stride - column, (y0 + y1) / 2 / stride - line]
    size = [float(np.log((x1 - x0) / stride)), float(np.log((y1 - y0) / stride))]
    probabilities = [0.0] * label + [probability]
    return [*centre, *size, objectness, *probabilities]


def _picture(height: int = SIDE, width: int = SIDE) -> tuple[ImageRecord, NDArray[np.uint8]]:
    image = np.full((height, width, 3), 100, np.uint8)
    return ImageRecord(1, Path("a.jpg"), width, height), image


def test_boxes_of_all_strides_are_decoded(write_model: WriteModel) -> None:
    rows = {
        8 * 2 + 3: _row((20, 12, 33, 25), column=3, line=2, stride=8, label=0, probability=0.9),
        64 + 4 * 1 + 2: _row((30, 10, 50, 40), column=2, line=1, stride=16, label=11),
        80 + 2 * 1 + 0: _row((2, 30, 40, 60), 0, 1, 32, label=79, objectness=0.5),
    }
    found = YoloxOnnx(write_model(rows)).prompts(*_picture())
    expected = [[20, 12, 33, 25], [30, 10, 50, 40], [2, 30, 40, 60]]
    assert np.allclose(found.boxes, expected, atol=1e-3)
    assert np.allclose(found.scores, [0.9, 0.5, 0.25])
    # COCO's ids have gaps: the 12th class is 13, the last one 90.
    assert found.category_ids.tolist() == [1, 13, 90]


def test_boxes_are_in_the_pixels_of_the_picture(write_model: WriteModel) -> None:
    path = write_model({0: _row((8, 4, 24, 28), 0, 0, 8, label=0)})
    wide = YoloxOnnx(path).prompts(*_picture(height=64, width=128))
    assert np.allclose(wide.boxes, [[16, 8, 48, 56]], atol=1e-3)
    small = YoloxOnnx(path).prompts(*_picture(height=32, width=16))
    assert np.allclose(small.boxes, [[4, 2, 12, 14]], atol=1e-3)


def test_overlaps_are_suppressed_within_a_class(write_model: WriteModel) -> None:
    box, near, far = (10, 10, 30, 30), (11, 10, 31, 30), (17, 10, 37, 30)
    rows = {
        0: _row(box, 0, 0, 8, label=2, probability=0.9),
        1: _row(near, 1, 0, 8, label=2, probability=0.8),
        2: _row(near, 2, 0, 8, label=3, probability=0.7),
        3: _row(far, 3, 0, 8, label=2, probability=0.6),
    }
    path = write_model(rows)
    found = YoloxOnnx(path).prompts(*_picture())
    assert np.allclose(found.scores, [0.9, 0.7, 0.6])
    assert found.category_ids.tolist() == [3, 4, 3]
    strict = YoloxOnnx(path, nms_threshold=0.4).prompts(*_picture())
    assert np.allclose(strict.scores, [0.9, 0.7])


def test_threshold_and_limit(write_model: WriteModel) -> None:
    rows = {
        i: _row((8 * i, 0, 8 * i + 7, 7), i, 0, 8, label=i, probability=0.1 * (i + 1))
        for i in range(6)
    }
    path = write_model(rows)
    assert len(YoloxOnnx(path).prompts(*_picture())) == 6
    assert np.allclose(YoloxOnnx(path, limit=2).prompts(*_picture()).scores, [0.6, 0.5])
    assert len(YoloxOnnx(path, score_threshold=0.35).prompts(*_picture())) == 3
    assert len(YoloxOnnx(write_model({})).prompts(*_picture())) == 0


def test_other_classes_are_those_of_the_data_set(write_model: WriteModel) -> None:
    path = write_model({0: _row((8, 4, 24, 28), 0, 0, 8, label=2)}, classes=4)
    found = YoloxOnnx(path, category_ids=[2, 4, 8, 16]).prompts(*_picture())
    assert found.category_ids.tolist() == [8]
    with pytest.raises(CheckpointError, match="knows 4 classes, the data set 3 categories"):
        YoloxOnnx(path, category_ids=[1, 2, 3]).prompts(*_picture())


def test_a_detector_of_91_classes_is_refused_on_coco(write_model: WriteModel) -> None:
    path = write_model({0: _row((8, 4, 24, 28), 0, 0, 8, label=2)}, classes=91)
    with pytest.raises(CheckpointError, match="knows 91 classes, the data set 80 categories"):
        YoloxOnnx(path, category_ids=COCO_CATEGORY_IDS).prompts(*_picture())
    with pytest.raises(CheckpointError, match="knows 91 classes, the data set 0 categories"):
        YoloxOnnx(path).prompts(*_picture())


def test_80_classes_are_coco_s_unless_the_data_set_has_80_of_its_own(
    write_model: WriteModel,
) -> None:
    path = write_model({0: _row((8, 4, 24, 28), 0, 0, 8, label=79)})
    given = {90: COCO_CATEGORY_IDS, 80: range(1, 81), 179: range(100, 180)}
    for last, ids in given.items():
        found = YoloxOnnx(path, category_ids=list(ids)).prompts(*_picture())
        assert found.category_ids.tolist() == [last]
    # A data set of some of COCO's categories, or a plain folder of pictures.
    for ids in ([1, 3], []):
        assert YoloxOnnx(path, category_ids=ids).prompts(*_picture()).category_ids.tolist() == [90]


def test_numbers_that_are_none_are_dropped_counted_and_suppress_nothing(
    write_model: WriteModel, caplog: pytest.LogCaptureFixture
) -> None:
    nan, inf = float("nan"), float("inf")
    box = (10, 10, 30, 30)
    good = {cell: _row(box, cell, 0, 8, label=cell) for cell in range(2)}
    bad = {
        10: _row(box, 2, 1, 8, label=0, objectness=nan),
        11: [nan, *_row(box, 3, 1, 8, label=0)[1:]],
        12: [0.0, 0.0, inf, inf, 1.0, 0.9],
        13: _row(box, 5, 1, 8, label=1, probability=nan),
    }
    expected = YoloxOnnx(write_model(good)).prompts(*_picture())
    assert len(expected) == 2
    assert not caplog.records
    for limit in (100, 2):
        caplog.clear()
        found = YoloxOnnx(write_model(good | bad), limit=limit).prompts(*_picture())
        assert np.array_equal(found.boxes, expected.boxes)
        assert np.array_equal(found.scores, expected.scores)
        messages = [record.getMessage() for record in caplog.records]
        assert messages == ["image id 1: dropped 4 x box that is not a number"]


def test_boxes_outside_of_the_picture(
    write_model: WriteModel, caplog: pytest.LogCaptureFixture
) -> None:
    """A picture 64 pixels wide and 32 high: what lies on the grey below it is no box."""
    rows = {
        0: _row((-10, -6, 20, 20), 0, 0, 8, label=0),
        63: _row((40, 40, 60, 60), 7, 7, 8, label=0),
    }
    found = YoloxOnnx(write_model(rows)).prompts(*_picture(height=32, width=64))
    assert np.allclose(found.boxes, [[0, 0, 20, 20]], atol=1e-3)
    assert "dropped 1 x box without area in the picture" in caplog.text


def test_letterbox_fills_up_with_grey_and_swaps_red_and_blue() -> None:
    image = np.zeros((20, 40, 3), np.uint8)
    image[:, :20] = (200, 100, 50)
    pixels, ratio = letterbox(image, 64, 64)
    assert ratio == pytest.approx(1.6)
    assert pixels.shape == (1, 3, 64, 64)
    assert pixels.dtype == torch.float32
    assert pixels[0, :, 5, 5].tolist() == [50, 100, 200]
    assert pixels[0, :, 31, 60].tolist() == [0, 0, 0]
    assert (pixels[0, :, 32:] == 114).all()


def test_coco_has_80_categories() -> None:
    assert len(COCO_CATEGORY_IDS) == 80
    assert (COCO_CATEGORY_IDS[0], COCO_CATEGORY_IDS[-1]) == (1, 90)


def test_fingerprints_follow_file_and_settings(write_model: WriteModel) -> None:
    path = write_model({})
    prints = {
        YoloxOnnx(path).fingerprint(),
        YoloxOnnx(path, score_threshold=0.1).fingerprint(),
        YoloxOnnx(path, nms_threshold=0.1).fingerprint(),
        YoloxOnnx(path, limit=3).fingerprint(),
        YoloxOnnx(path, category_ids=[1, 2]).fingerprint(),
        YoloxOnnx(write_model({0: [1.0]})).fingerprint(),
    }
    assert len(prints) == 6
    assert YoloxOnnx(write_model({})).fingerprint() in prints


def test_other_models_are_one_line_that_names_the_file(
    write_model: WriteModel, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"not there: detector .*none\.onnx"):
        YoloxOnnx(tmp_path / "none.onnx")
    with pytest.raises(CheckpointError, match=r"gives \[1, 80, 85\], YOLOX on 64x64 .* \[1, 84"):
        YoloxOnnx(write_model({}, cells=80)).prompts(*_picture())
    with pytest.raises(CheckpointError, match=r"input \[1, 3, 'h', 'w'\].*fixed size"):
        YoloxOnnx(write_model({}, shape=(1, 3, "h", "w"))).prompts(*_picture())
    with pytest.raises(CheckpointError, match=r"input \[1, 3, 60, 64\].*multiples of 32"):
        YoloxOnnx(write_model({}, shape=(1, 3, 60, 64))).prompts(*_picture())
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"this is no model")
    with pytest.raises(CheckpointError, match=r"garbage\.onnx is no usable ONNX model") as caught:
        YoloxOnnx(garbage).prompts(*_picture())
    assert "\n" not in str(caught.value)


def test_without_onnxruntime_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    path = tmp_path / "detector.onnx"
    path.write_bytes(b"")
    source = YoloxOnnx(path)
    with pytest.raises(DependencyError, match=r"pip install ptq4sam\[onnx\]"):
        source.prompts(*_picture())


def test_a_trained_yolox_reaches_its_box_ap(shared_dir: Path) -> None:
    """At most one point of AP below the 30.9 that were measured with its authors' code."""
    pytest.importorskip("onnxruntime")
    data = shared_dir / "data"
    mini = data / "coco_mini"
    dataset = CocoDataset(mini / "images" / "val2017", mini / "annotations" / "instances_val.json")
    source = YoloxOnnx(data / "detector" / "yolox_nano.onnx", dataset.category_ids)
    reference = CocoResults(data / "detector" / "yolox_nano_val_boxes.json", dataset)
    ours, theirs = BoxScores(dataset), BoxScores(dataset)
    for record in dataset.images:
        image = dataset.load(record)
        ours.add(source.prompts(record, image))
        theirs.add(reference.prompts(record, image))
    assert ours.summarize()["AP"] >= 30.5
    assert ours.summarize()["AP"] >= theirs.summarize()["AP"] - 0.4
