from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ptq4sam.data import CocoDataset
from ptq4sam.errors import CheckpointError, ConfigError, DataError
from ptq4sam.prompts import (
    CocoResults,
    DetrDetector,
    GroundTruth,
    TorchvisionDetector,
    TransformersDetector,
    YoloxOnnx,
    YoloxTorch,
    open_prompts,
    write_results,
)


def test_every_spec_opens_its_source(scenes: CocoDataset, tmp_path: Path) -> None:
    truth = open_prompts("ground-truth", scenes)
    assert isinstance(truth, GroundTruth)
    found = truth.prompts(scenes.images[0], np.zeros((0, 0, 3), np.uint8))
    write_results([found], tmp_path / "boxes.json")
    assert isinstance(open_prompts(f"{tmp_path}/boxes.json", scenes), CocoResults)
    (tmp_path / "a.onnx").write_bytes(b"not opened yet")
    assert isinstance(open_prompts(f"onnx:{tmp_path}/a.onnx", scenes), YoloxOnnx)
    assert isinstance(open_prompts(f"yolox:{tmp_path}/a.onnx", scenes), YoloxTorch)
    for kind in ("hdetr", "focalnet-dino"):
        assert isinstance(open_prompts(f"{kind}:{tmp_path}/a.onnx", scenes), DetrDetector)
    named = open_prompts(f"torchvision:fasterrcnn_resnet50_fpn:{tmp_path}/a.onnx", scenes)
    assert isinstance(named, TorchvisionDetector)


def test_a_folder_of_transformers(scenes: CocoDataset, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text("{}")
    assert isinstance(open_prompts(f"transformers:{tmp_path}", scenes), TransformersDetector)


def test_the_scene_detector_finds_objects_of_scenes(scenes: CocoDataset) -> None:
    source = open_prompts("scene-detector", scenes)
    record = scenes.images[0]
    found = source.prompts(record, scenes.load(record))
    assert len(found) >= 3
    assert set(found.category_ids.tolist()) <= set(scenes.category_ids)


def test_missing_files_are_errors_at_once(scenes: CocoDataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file of boxes"):
        open_prompts(f"{tmp_path}/none.json", scenes)
    for kind in ("onnx", "yolox", "hdetr", "focalnet-dino", "torchvision:fcos_resnet50_fpn"):
        with pytest.raises(CheckpointError, match=r"not there: detector .*none.pth: name another"):
            open_prompts(f"{kind}:{tmp_path}/none.pth", scenes)
    with pytest.raises(CheckpointError, match=r"run ptq4sam download yolox-nano-onnx$"):
        open_prompts(f"onnx:{tmp_path}/yolox_nano.onnx", scenes)


def test_a_name_that_is_not_understood(scenes: CocoDataset) -> None:
    with pytest.raises(ConfigError, match="did you mean ground-truth"):
        open_prompts("ground_truth", scenes)
