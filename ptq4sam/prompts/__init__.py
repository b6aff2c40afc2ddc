"""Where boxes come from: one record, one interface, a small adapter a source, a cache on disk."""

from ptq4sam.prompts.cache import CachedPrompts, CacheFolders, cached
from ptq4sam.prompts.coco_results import CocoResults, to_results, write_results
from ptq4sam.prompts.detr import DetrDetector
from ptq4sam.prompts.factory import open_prompts
from ptq4sam.prompts.ground_truth import Clicks, GroundTruth
from ptq4sam.prompts.mmdet_detector import MmdetDetector
from ptq4sam.prompts.record import Prompts, PromptSource, clean
from ptq4sam.prompts.torchvision_detector import TorchvisionDetector
from ptq4sam.prompts.transformers_detector import TransformersDetector
from ptq4sam.prompts.yolox import YoloxOnnx, YoloxTorch

__all__ = [
    "CacheFolders",
    "CachedPrompts",
    "Clicks",
    "CocoResults",
    "DetrDetector",
    "GroundTruth",
    "MmdetDetector",
    "PromptSource",
    "Prompts",
    "TorchvisionDetector",
    "TransformersDetector",
    "YoloxOnnx",
    "YoloxTorch",
    "cached",
    "clean",
    "open_prompts",
    "to_results",
    "write_results",
]
