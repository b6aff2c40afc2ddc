"""Experiments: what a configuration file under projects/configs/ describes, typed and checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from ptq4sam.downloads import where_from
from ptq4sam.errors import CheckpointError, DependencyError
from ptq4sam.evaluation.prompting import Prompting
from ptq4sam.records import FieldError, Record
from ptq4sam.solver.config import load_config

DetectorType = Literal[
    "ground-truth",
    "results",
    "scene-detector",
    "onnx",
    "yolox",
    "torchvision",
    "hdetr",
    "focalnet_dino",
    "mmdet",
]
"""Where boxes come from."""

_WITH_FILE = ("onnx", "yolox", "results", "hdetr", "focalnet_dino", "mmdet")

_OTHER_BOXES = "boxes of any detector can be given: --prompts boxes.json"


@dataclass(frozen=True)
class SamConfig(Record):
    """Which SAM.

    Attributes:
        type: its size; vit_nano ships with the package.
        checkpoint: its weights; None for those that ship with the package.
    """

    type: Literal["vit_nano", "vit_b", "vit_l", "vit_h"]
    checkpoint: Path | None = None

    def require_weights(self) -> None:
        """Check that the weights are there.

        Raises:
            CheckpointError: they are not; the message says where to get them.
        """
        _require_weights(self.checkpoint, self.type)


@dataclass(frozen=True)
class DetectorConfig(Record):
    """Which detector gives the boxes.

    Attributes:
        type: kind of detector or source.
        checkpoint: its weights, an .onnx file for "onnx", YOLOX's own .pth file for
            "yolox", or a COCO results JSON for "results".
        config: a file under mmdetection/configs/ (or one of mmdet's own) for "mmdet"; the model's
            name in torchvision for "torchvision".
    """

    type: DetectorType
    checkpoint: Path | None = None
    config: str | None = None

    def _validate(self) -> None:
        if self.type in _WITH_FILE and self.checkpoint is None:
            raise FieldError("checkpoint", f"missing; a {self.type} detector needs a file")
        if self.type in ("mmdet", "torchvision") and self.config is None:
            raise FieldError("config", f"missing; a {self.type} detector needs one")

    def require_weights(self) -> None:
        """Check that the detector's file is there.

        Raises:
            CheckpointError: it is not; the message says where to get it.
        """
        _require_weights(self.checkpoint, f"detector {self.type!r}", f"; {_OTHER_BOXES}")

    def require_available(self) -> None:
        """Check that the detector can run here.

        Raises:
            DependencyError: its library is not installed.
        """
        if self.type == "onnx" and find_spec("onnxruntime") is None:
            problem = "detector 'onnx' needs onnxruntime: pip install 'ptq4sam[onnx]'"
        elif self.type == "mmdet" and not all(map(find_spec, ("mmengine", "mmcv", "mmdet"))):
            problem = "detector 'mmdet' needs mmdetection: ./environment.sh mmdet"
        else:
            return
        raise DependencyError(f"{problem}; {_OTHER_BOXES}")

    @property
    def prompts(self) -> str:
        """The same source as an argument of `ptq4sam evaluate --prompts`.

        Raises:
            DependencyError: the detector cannot run here.
        """
        self.require_available()
        if self.type == "results":
            return str(self.checkpoint)
        if self.type in ("onnx", "yolox"):
            return f"{self.type}:{self.checkpoint}"
        if self.type == "torchvision":
            return f"torchvision:{self.config}" + (f":{self.checkpoint}" if self.checkpoint else "")
        if self.type in ("hdetr", "focalnet_dino"):
            return f"{self.type.replace('_', '-')}:{self.checkpoint}"
        if self.type == "mmdet":
            return f"mmdet:{self.config}:{self.checkpoint}"
        return self.type


@dataclass(frozen=True)
class DataConfig(Record):
    """A data set.

    Attributes:
        images: folder.
        annotations: COCO instances JSON; None takes every picture in the folder.
        limit: use the first ones only.
    """

    images: Path
    annotations: Path | None = None
    limit: int | None = None

    def _validate(self) -> None:
        self._require(self.limit is None or self.limit >= 1, "limit", "1 or more")


@dataclass(frozen=True)
class ExperimentConfig(Record):
    """An experiment: model, detector, data and prompting.

    Attributes:
        sam: the model to quantize.
        detector: where boxes come from.
        data: pictures to score.
        calibration: pictures to calibrate on; the scheme says how many.
        prompting: from boxes to masks.
    """

    sam: SamConfig
    detector: DetectorConfig
    data: DataConfig
    calibration: DataConfig | None = None
    prompting: Prompting = field(default_factory=Prompting)

    @classmethod
    def from_file(cls, path: str | Path, *options: str) -> ExperimentConfig:
        """Read a configuration file.

        Args:
            path: the file.
            options: overrides as after --cfg-options, "sam.checkpoint=other.pth".

        Raises:
            ConfigError: the file cannot be read, or a key or value is not usable.
        """
        return cls.from_dict(load_config(path, options), path)


def _require_weights(path: Path | None, owner: str, otherwise: str = "") -> None:
    if path is not None and not path.exists():
        raise CheckpointError(
            f"{owner} needs {path}, which is not there: {where_from(path)}{otherwise}"
        )
