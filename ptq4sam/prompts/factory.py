"""Prompt sources by the names that the command line gives them."""

from __future__ import annotations

import difflib
from pathlib import Path

import torch

from ptq4sam.data.images import ImageSet
from ptq4sam.errors import ConfigError
from ptq4sam.prompts.coco_results import CocoResults
from ptq4sam.prompts.detr import DETR_VARIANTS, DetrDetector
from ptq4sam.prompts.ground_truth import GroundTruth
from ptq4sam.prompts.mmdet_detector import MmdetDetector
from ptq4sam.prompts.record import PromptSource
from ptq4sam.prompts.torchvision_detector import TorchvisionDetector
from ptq4sam.prompts.transformers_detector import TransformersDetector
from ptq4sam.prompts.yolox import YoloxOnnx, YoloxTorch

PROMPT_SPECS = (
    "BOXES.json",
    "ground-truth",
    "scene-detector",
    "onnx:FILE",
    "yolox:FILE.pth",
    "hdetr:FILE",
    "focalnet-dino:FILE",
    "torchvision:NAME[:FILE]",
    "transformers:FOLDER",
    "mmdet:CONFIG:CHECKPOINT",
)
"""What `open_prompts` understands."""


def open_prompts(spec: str, dataset: ImageSet, device: torch.device | str = "cpu") -> PromptSource:
    """The prompt source of a name.

    Args:
        spec: one of `PROMPT_SPECS`.
        dataset: the pictures that are to be prompted.
        device: where a detector runs.

    Raises:
        ConfigError: the name is not understood.
        DataError: boxes or annotations are missing or damaged.
        CheckpointError: a detector's weights are.
        DependencyError: the library that a detector needs is not installed.
    """
    kind, _, rest = spec.partition(":")
    if spec == "ground-truth":
        return GroundTruth(dataset)
    if spec == "scene-detector":
        from ptq4sam.prompts.scene_detector import SceneDetector

        return SceneDetector(device=device)
    if kind == "onnx" and rest:
        return YoloxOnnx(Path(rest), dataset.category_ids, device=device)
    if kind == "yolox" and rest:
        return YoloxTorch(Path(rest), dataset.category_ids, device=device)
    if kind == "torchvision" and rest:
        name, _, file = rest.partition(":")
        return TorchvisionDetector(name, Path(file) if file else None, device=device)
    if kind in DETR_VARIANTS and rest:
        return DetrDetector(kind, Path(rest), device=device)
    if kind == "transformers" and rest:
        return TransformersDetector(rest, dataset.category_names, device=device)
    if kind == "mmdet" and ":" in rest:
        config, _, file = rest.rpartition(":")
        return MmdetDetector(config, Path(file), dataset.category_ids, device=device)
    if spec.endswith(".json"):
        return CocoResults(Path(spec), dataset)
    near = difflib.get_close_matches(spec, PROMPT_SPECS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(f"no prompts are named {spec!r}: {hint}known are {', '.join(PROMPT_SPECS)}")
