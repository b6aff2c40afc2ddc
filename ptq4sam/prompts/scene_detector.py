"""The embedded detector of generated scenes: a small Faster R-CNN (Ren et al., 2015).

It is torchvision's own Faster R-CNN with a feature pyramid (Lin et al., 2017) on a small residual
backbone, trained from scratch by `tools/train_scene_detector.py`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ptq4sam import numerics
from ptq4sam.data.images import ImageRecord
from ptq4sam.data.scenes import SCENE_CATEGORIES
from ptq4sam.errors import CheckpointError, DependencyError
from ptq4sam.prompts.record import Prompts, clean

SCENE_DETECTOR_WEIGHTS = Path(__file__).parents[1] / "assets" / "scene_detector.safetensors"

_WIDTHS = (16, 32, 64, 128, 192)
_PYRAMID_CHANNELS = 64
_IMAGE_SIDES = (256, 320)


class _ConvNorm(nn.Module):
    """Convolution, batch norm (until folded) and, where asked for, ReLU; (N, C, H, W)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int = 1,
        kernel: int = 3,
        activate: bool = True,
        folded: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=folded)
        self.norm: nn.Module = nn.Identity() if folded else nn.BatchNorm2d(outputs)
        self.activate = activate

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        x = self.norm(self.conv(x))
        return torch.relu_(x) if self.activate else x

    def fold(self) -> None:
        """Folds the batch norm's running statistics into the convolution; eval mode only."""
        if isinstance(self.norm, nn.BatchNorm2d):
            self.conv = nn.utils.fusion.fuse_conv_bn_eval(self.conv, self.norm)
            self.norm = nn.Identity()


class _Residual(nn.Module):
    """Basic residual block (He et al., 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int, folded: bool) -> None:
        super().__init__()
        self.first = _ConvNorm(inputs, outputs, stride, folded=folded)
        self.second = _ConvNorm(outputs, outputs, activate=False, folded=folded)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = _ConvNorm(inputs, outputs, stride, 1, activate=False, folded=folded)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(self.second(self.first(x)) + self.shortcut(x))


class _Backbone(nn.Module):
    """Residual network with a feature pyramid at strides 4, 8, 16 and 32."""

    def __init__(self, folded: bool) -> None:
        from torchvision.ops import FeaturePyramidNetwork

        super().__init__()
        stem, *widths = _WIDTHS
        self.stem = _ConvNorm(3, stem, stride=2, folded=folded)
        self.stages = nn.ModuleList()
        for inputs, outputs in zip(_WIDTHS, widths, strict=False):
            down = _Residual(inputs, outputs, 2, folded)
            self.stages.append(nn.Sequential(down, _Residual(outputs, outputs, 1, folded)))
        self.pyramid = FeaturePyramidNetwork(widths, _PYRAMID_CHANNELS)
        self.out_channels = _PYRAMID_CHANNELS

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        features: dict[str, Tensor] = {}
        for index, stage in enumerate(self.stages):
            x = stage(x)
            features[str(index)] = x
        levels: dict[str, Tensor] = self.pyramid(features)
        return levels


def build_scene_detector(folded: bool = True, score_threshold: float = 0.05) -> nn.Module:
    """Builds the detector with random weights.

    Args:
        folded: without batch norms, as the shipped weights are; training needs False.
        score_threshold: detections below it are dropped.

    Returns:
        A torchvision `FasterRCNN`: a list of RGB images (3, H, W) in [0, 1] to a list of
        dictionaries with `boxes` (N, 4) xyxy in px, `scores` (N,) and `labels` (N,), the label
        being the index into `SCENE_CATEGORIES` plus one.

    Raises:
        DependencyError: torchvision is not installed.
    """
    try:
        from torchvision.models.detection import FasterRCNN
        from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
        from torchvision.models.detection.rpn import AnchorGenerator
        from torchvision.ops import MultiScaleRoIAlign
    except ImportError as error:
        raise DependencyError(
            "the scene detector needs torchvision, which is not installed: pip install torchvision"
        ) from error
    hidden, pool = 256, 7
    levels = [str(index) for index in range(4)]
    model: nn.Module = FasterRCNN(
        _Backbone(folded),
        min_size=_IMAGE_SIDES[0],
        max_size=_IMAGE_SIDES[1],
        image_mean=[0.45, 0.45, 0.45],
        image_std=[0.25, 0.25, 0.25],
        rpn_anchor_generator=AnchorGenerator(
            sizes=((20,), (40,), (80,), (150,)), aspect_ratios=((0.5, 1.0, 2.0),) * 4
        ),
        rpn_pre_nms_top_n_train=500,
        rpn_post_nms_top_n_train=250,
        rpn_pre_nms_top_n_test=400,
        rpn_post_nms_top_n_test=150,
        rpn_batch_size_per_image=128,
        # The canonical size spreads objects of 20 to 190 px over the levels.
        box_roi_pool=MultiScaleRoIAlign(levels, pool, 2, canonical_scale=112, canonical_level=4),
        box_head=TwoMLPHead(_PYRAMID_CHANNELS * pool * pool, hidden),
        box_predictor=FastRCNNPredictor(hidden, len(SCENE_CATEGORIES) + 1),
        box_score_thresh=score_threshold,
        box_nms_thresh=0.5,
        box_detections_per_img=50,
        box_batch_size_per_image=64,
    )
    return model


def fold_batch_norms(model: nn.Module) -> None:
    """Folds every batch norm of a trained detector in place and leaves it in eval mode."""
    model.eval()
    for module in list(model.modules()):
        if isinstance(module, _ConvNorm):
            module.fold()


class SceneDetector:
    """Prompt source: boxes of the embedded detector of generated scenes.

    Category ids are those of the data sets that `ptq4sam.data.scenes.write_scenes` writes.

    Args:
        weights: safetensors file with folded batch norms; None = the one shipped.
        score_threshold: detections below it are dropped.
        device: where the detector runs.

    Raises:
        DependencyError: torchvision is not installed.
        CheckpointError: the weights are missing or do not fit.
    """

    name = "scene-detector"

    def __init__(
        self,
        weights: Path | None = None,
        score_threshold: float = 0.05,
        device: torch.device | str = "cpu",
    ) -> None:
        path = SCENE_DETECTOR_WEIGHTS if weights is None else weights
        self.score_threshold = score_threshold
        self.device = torch.device(device)
        self._model = build_scene_detector(score_threshold=score_threshold)
        self._digest = _load_weights(self._model, path)
        self._model.eval().to(self.device)

    def fingerprint(self) -> str:
        """Identifies weights, settings and device, for the cache of detections."""
        place = numerics.fingerprint(self.device)
        text = f"{self.name} {self._digest} {self.score_threshold!r} {_IMAGE_SIDES} {place}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @torch.no_grad()
    def detect(
        self, image: NDArray[np.uint8]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
        """Detects objects in one RGB image (H, W, 3).

        Returns:
            Boxes (N, 4) xyxy in px of the image, scores (N,) in descending order, category ids
            (N,).
        """
        pixels = torch.from_numpy(np.array(image)).to(self.device).permute(2, 0, 1)
        found: dict[str, Any] = self._model([pixels.float() / 255.0])[0]
        return (
            found["boxes"].float().cpu().numpy(),
            found["scores"].float().cpu().numpy(),
            found["labels"].long().cpu().numpy(),
        )

    def prompts(self, record: ImageRecord, image: NDArray[np.uint8]) -> Prompts:
        """Boxes of one RGB image (H, W, 3), in its own pixels, best first."""
        return clean(record, *self.detect(image))


def _load_weights(model: nn.Module, path: Path) -> str:
    """Loads float16 weights into a folded detector and returns the file's SHA-256 digest."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        content = path.read_bytes()
        model.load_state_dict({key: value.float() for key, value in load(content).items()})
    except FileNotFoundError as error:
        raise CheckpointError(
            f"scene detector: there is no weight file {path}; "
            "train one with tools/train_scene_detector.py"
        ) from error
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"scene detector: {path} does not hold weights of this detector ({reason}); "
            "train one with tools/train_scene_detector.py"
        ) from error
    return hashlib.sha256(content).hexdigest()
