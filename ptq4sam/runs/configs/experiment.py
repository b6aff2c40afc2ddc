"""Experiments: what a configuration file under projects/configs/ describes, typed and checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ptq4sam.evaluation.prompting import Prompting
from ptq4sam.families import VARIANTS
from ptq4sam.records import FieldError, Record
from ptq4sam.runs.configs.literals import load_config
from ptq4sam.shipped import CONFIGS, find

DetectorType = Literal[
    "ground-truth",
    "results",
    "scene-detector",
    "onnx",
    "yolox",
    "torchvision",
    "transformers",
    "hdetr",
    "focalnet_dino",
    "mmdet",
]
"""Where boxes come from."""

_WITH_FILE = ("onnx", "yolox", "results", "transformers", "hdetr", "focalnet_dino", "mmdet")


@dataclass(frozen=True)
class SamConfig(Record):
    """Which SAM.

    Attributes:
        type: its name, a key of `families.VARIANTS`.
        checkpoint: its weights; None for those that ship with the package.
    """

    type: str
    checkpoint: Path | None = None

    def _validate(self) -> None:
        if self.type not in VARIANTS:
            raise FieldError("type", f"{self.type!r} given, one of {', '.join(VARIANTS)}")


@dataclass(frozen=True)
class DetectorConfig(Record):
    """Which detector gives the boxes.

    Attributes:
        type: kind of detector or source.
        checkpoint: its weights, an .onnx file for "onnx", YOLOX's own .pth file for
            "yolox", a folder for "transformers", or a COCO results JSON for "results".
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

    @property
    def prompts(self) -> str:
        """The same source as `open_prompts` names it."""
        if self.type == "results":
            return str(self.checkpoint)
        if self.type in ("onnx", "yolox", "transformers"):
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
        recursive: without annotations, every picture in subfolders too.
    """

    images: Path
    annotations: Path | None = None
    limit: int | None = None
    recursive: bool = False

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
            path: the file, or the name of one that ships, as yolo_l-sam-vit-b.
            options: overrides, "sam.checkpoint=other.pth".

        Raises:
            ConfigError: the file cannot be read, or a key or value is not usable.
        """
        return cls.from_dict(load_config(find(path, CONFIGS, "configuration"), options), path)
