"""Prompt sources by the names that the command line gives them."""

from __future__ import annotations

import torch

from ptq4sam.data.images import ImageSet
from ptq4sam.prompts.coco_results import CocoResults
from ptq4sam.prompts.detr import DETR_VARIANTS, DetrDetector
from ptq4sam.prompts.ground_truth import Clicks, GroundTruth
from ptq4sam.prompts.mmdet_detector import MmdetDetector
from ptq4sam.prompts.record import PromptSource
from ptq4sam.prompts.spec import ALL, Spec, parse_spec
from ptq4sam.prompts.torchvision_detector import TorchvisionDetector
from ptq4sam.prompts.transformers_detector import TransformersDetector
from ptq4sam.prompts.yolox import YoloxOnnx, YoloxTorch


def open_prompts(
    spec: str | Spec, dataset: ImageSet, device: torch.device | str = "cpu"
) -> PromptSource:
    """The prompt source of a name.

    Args:
        spec: as `parse_spec` reads it.
        dataset: the pictures that are to be prompted.
        device: where a detector runs.

    Raises:
        ConfigError: the name is not understood.
        DataError: boxes or annotations are missing or damaged.
        CheckpointError: a detector's weights are.
        DependencyError: the library that a detector needs is not installed.
    """
    if isinstance(spec, str):
        spec = parse_spec(spec)
    kind, name, file = spec.kind, spec.name, spec.file
    if kind == "ground-truth":
        return GroundTruth(dataset, crowds=name == ALL)
    if kind == "clicks":
        return Clicks(dataset, int(name))
    if kind == "scene-detector":
        from ptq4sam.prompts.scene_detector import SceneDetector

        return SceneDetector(device=device)
    if kind == "torchvision":
        return TorchvisionDetector(name, file, device=device)
    if kind == "transformers":
        return TransformersDetector(name, dataset.category_names, device=device)
    if file is None:
        raise ValueError(f"parse_spec gives every source of {kind} a file")
    if kind == "onnx":
        return YoloxOnnx(file, dataset.category_ids, device=device)
    if kind == "yolox":
        return YoloxTorch(file, dataset.category_ids, device=device)
    if kind in DETR_VARIANTS:
        return DetrDetector(kind, file, device=device)
    if kind == "mmdet":
        return MmdetDetector(name, file, dataset.category_ids, device=device)
    return CocoResults(file, dataset)
