"""Detectors of mmdetection with random weights that find boxes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ptq4sam.prompts.mmdet_detector import build_detector

CONFIGS = Path(__file__).resolve().parents[1] / "mmdetection" / "configs"
YOLOX_L = CONFIGS / "yolox" / "yolox_l_8x8_300e_coco.py"
FASTER_RCNN = CONFIGS / "faster_rcnn" / "faster_rcnn_r50_fpn_2x_coco.py"


def require_mmdet() -> None:
    """Skip the test where the extra mmdet is not installed, or mmcv is without its operators."""
    for library in ("mmengine", "mmcv._ext", "mmdet"):
        pytest.importorskip(library, reason="the extra mmdet is not installed")


def random_detector(config: Path, seed: int = 0) -> Any:
    """The model of a configuration, with outputs of a size that gives boxes and passing scores."""
    torch.manual_seed(seed)
    model = build_detector(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("level_embed"):  # mmdet leaves its memory as it was found
                parameter.normal_()
        if config == YOLOX_L:  # features of an untrained one are some millions
            for branch in ("cls", "reg", "obj"):
                for convolution in getattr(model.bbox_head, f"multi_level_conv_{branch}"):
                    convolution.weight.mul_(5e-7)
        if config == FASTER_RCNN:  # 81 classes of equal probability are below the threshold
            model.roi_head.init_weights()
            model.roi_head.bbox_head.fc_cls.weight.mul_(300)
            model.rpn_head.rpn_cls.weight.mul_(10)
    return model
