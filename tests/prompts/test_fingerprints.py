"""Boxes that one device found are not taken for those of another, whose last bits differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from ptq4sam.numerics import products_of
from ptq4sam.prompts import PromptSource, TorchvisionDetector
from ptq4sam.prompts.detr.detector import DetrDetector
from ptq4sam.prompts.mmdet_detector import MmdetDetector
from ptq4sam.prompts.scene_detector import SceneDetector
from ptq4sam.prompts.transformers_detector import TransformersDetector
from ptq4sam.prompts.yolox import YoloxTorch
from tests.mmdet_models import CONFIGS, require_mmdet

Make = Callable[[Path, str], PromptSource]


def mmdet(file: Path, device: str) -> PromptSource:
    require_mmdet()
    return MmdetDetector(CONFIGS / "yolox/yolox_nano_8x8_300e_coco.py", file, device=device)


def transformers(file: Path, device: str) -> PromptSource:
    pytest.importorskip("transformers")
    return TransformersDetector(str(file.parent), {1: "a"}, device=device)


DETECTORS: dict[str, Make] = {
    "scene": lambda _file, device: SceneDetector(device=device),
    "torchvision": lambda _file, device: TorchvisionDetector(nn.Linear(1, 1), device=device),
    "transformers": transformers,
    "yolox": lambda file, device: YoloxTorch(file, device=device),
    "hdetr": lambda file, device: DetrDetector("hdetr", file, device=device),
    "mmdet": mmdet,
}


@pytest.mark.parametrize("kind", DETECTORS)
def test_a_device_and_how_it_computes_are_in_the_fingerprint(kind: str, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (tmp_path / name).write_text("{}")

    def fingerprint(device: str) -> str:
        torch.manual_seed(0)
        return DETECTORS[kind](tmp_path / "model.safetensors", device).fingerprint()

    assert fingerprint("cpu") == fingerprint("cpu") != fingerprint("meta")
    with products_of("highest"):
        exact = fingerprint("cpu")
    with products_of("high"):
        assert fingerprint("cpu") != exact
