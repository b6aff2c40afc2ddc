"""Any detector of an installed mmdetection 3: YOLOX, Faster R-CNN, DINO, ..."""

from __future__ import annotations

import ast
import hashlib
import warnings
from collections.abc import Sequence
from functools import cached_property
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ptq4sam import numerics
from ptq4sam.data.images import ImageRecord, reason
from ptq4sam.errors import ConfigError, DependencyError
from ptq4sam.nearest import nearest
from ptq4sam.prompts.categories import category_ids_by_number
from ptq4sam.prompts.detections import file_digest
from ptq4sam.prompts.mmdet_checkpoint import load_weights
from ptq4sam.prompts.record import Prompts, clean
from ptq4sam.shipped import located

_LIBRARIES = ("mmengine", "mmcv", "mmdet")
_BOXES = 100
"""Boxes of a picture where the configuration sets no number, as that of YOLOX: COCO's own."""

_NOT_BUILT = (OSError, SyntaxError, LookupError, NameError, TypeError, ValueError, AttributeError)


class MmdetDetector:
    """Prompt source: boxes of an mmdetection model, with the pipeline of its configuration.

    Resizing, padding, normalisation, score threshold, non-maximum suppression and the number of
    boxes are the configuration's.

    Args:
        config: a file in mmengine's style, or the path of one below those that mmdet ships with
            ("yolox/yolox_l_8xb8-300e_coco.py"). mmengine runs it as Python: give none that you
            would not run.
        checkpoint: weights of mmdetection 2 or 3 for it.
        category_ids: the data set's ids of the detector's classes, in the classes' order; used
            where they are as many as the detector's classes.
        limit: keep at most so many boxes a picture; None takes the configuration's `max_per_img`
            (-1: all, as mmdetection reads it), and 100 where it has none.
        device: where it runs.

    Raises:
        ConfigError: there is no such configuration; at the first picture, it makes no detector.
        CheckpointError: the checkpoint is missing; at the first picture, it does not fit.
        DependencyError: mmdetection is not installed, or without mmcv's compiled operators.
    """

    name = "mmdet"

    def __init__(
        self,
        config: str | Path,
        checkpoint: Path,
        category_ids: Sequence[int] = (),
        limit: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        versions = _versions()
        self.config, self.checkpoint, self.limit = _find(str(config)), checkpoint, limit
        self._given_ids = tuple(category_ids)
        self._device = torch.device(device)
        self._identity = f"{versions} {_texts_digest(self.config)} {file_digest(checkpoint)}"

    def fingerprint(self) -> str:
        """Identifies libraries, configuration, weights, settings and device."""
        place = numerics.fingerprint(self._device)
        return f"mmdet {self._identity} {self.limit} {self._given_ids} {place}"

    def prompts(self, record: ImageRecord, image: NDArray[np.uint8]) -> Prompts:
        """Boxes of an RGB picture [height, width, 3], best first.

        Raises:
            ConfigError, CheckpointError, DependencyError: as the constructor says.
        """
        model, category_ids = self._model, self._category_ids
        from mmdet.apis import inference_detector

        # mmdetection's pipelines begin with what OpenCV reads: blue first.
        found = inference_detector(model, np.ascontiguousarray(image[..., ::-1])).pred_instances
        boxes, scores, labels = (found[key].cpu().numpy() for key in ("bboxes", "scores", "labels"))
        return clean(record, boxes, scores, category_ids[labels], self._limit)

    @cached_property
    def _model(self) -> Any:
        model = build_detector(self.config, self._device)
        load_weights(model, self.checkpoint, self.config.stem)
        return model

    @cached_property
    def _category_ids(self) -> NDArray[np.int64]:
        classes = _head(self._model).num_classes
        return category_ids_by_number(classes, self._given_ids, str(self.config))

    @property
    def _limit(self) -> int | None:
        if self.limit is not None:
            return self.limit
        settings = self._model.cfg.model.test_cfg
        limit = int(settings.get("rcnn", settings).get("max_per_img", _BOXES))
        return limit if limit >= 0 else None


def build_detector(config: Path, device: torch.device | str = "cpu") -> Any:
    """The model of a configuration, for inference, with random weights.

    Args:
        config: a file in mmengine's style.
        device: where the model is to be.

    Raises:
        ConfigError: the file does not describe a detector.
        DependencyError: mmdetection is not installed, or without mmcv's compiled operators.
    """
    # Taken and dropped: what mmdetection says of its own imports and of weights that are not there
    # yet. A filter would not do, since it sets its own.
    with warnings.catch_warnings(record=True):
        try:
            from mmdet.apis import init_detector
        except (ImportError, AssertionError) as error:  # mmdet asserts the versions that it takes
            raise DependencyError(_how_to_install(reason(error))) from error
        try:
            # The palette is given since finding one would open the data set.
            return init_detector(str(config), palette="coco", device=str(device))
        except _NOT_BUILT as error:
            raise ConfigError(f"{config} describes no detector: {reason(error)}") from error


def _head(model: nn.Module) -> Any:
    """The head that classifies: the last one of a cascade."""
    head = getattr(model, "roi_head", model).bbox_head
    return head[-1] if isinstance(head, nn.ModuleList) else head


def _find(config: str) -> Path:
    """A configuration here, one of ours, or one of those that mmdet ships with."""
    here = located(Path(config))
    if here.is_file():
        return here
    shipped = _shipped()
    name = config.removeprefix("mmdet::")
    if (shipped / name).is_file():
        return shipped / name
    known = [str(path.relative_to(shipped)) for path in shipped.glob("*/*.py")]
    near = nearest(name, known)
    hint = f"did you mean {near}?" if near else "see mmdetection/configs"
    raise ConfigError(f"no configuration {config}, neither here nor in mmdet: {hint}")


def _shipped() -> Path:
    """The folder of mmdet's configurations; mmdet itself is not imported."""
    spec = find_spec("mmdet")
    if spec is None or spec.origin is None:
        raise DependencyError(_how_to_install("mmdet is not here"))
    return Path(spec.origin).parent / ".mim" / "configs"


def _texts_digest(config: Path) -> str:
    """Identifies a configuration by its text and those of its bases.

    mmdet's own are known by its version; a base that is not a literal path is not followed.
    """
    digest = hashlib.sha256()
    waiting, seen = [config], set()
    while waiting:
        path = waiting.pop()
        if path.resolve() in seen:
            continue
        seen.add(path.resolve())
        text = path.read_bytes()
        digest.update(text)
        waiting += [path.parent / base for base in _bases(text, path)]
    return digest.hexdigest()[:16]


def _bases(text: bytes, path: Path) -> list[str]:
    """The files that a configuration names in `_base_`, as written."""
    try:
        statements = ast.parse(text).body
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{path} is not Python: {reason(error)}") from error
    values = [
        statement.value
        for statement in statements
        if isinstance(statement, ast.Assign)
        and any(isinstance(name, ast.Name) and name.id == "_base_" for name in statement.targets)
    ]
    texts = [
        node.value
        for value in values
        for node in ast.walk(value)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    return [text for text in texts if (path.parent / text).is_file()]


def _versions() -> str:
    try:
        return " ".join(f"{name} {metadata.version(name)}" for name in _LIBRARIES)
    except metadata.PackageNotFoundError as error:
        raise DependencyError(_how_to_install(f"{error.name} is not installed")) from error


def _how_to_install(problem: str) -> str:
    return (
        f"detectors of mmdetection need mmengine, mmcv with its operators and mmdet ({problem}): "
        "./environment.sh mmdet installs them; or give boxes of any detector as boxes.json"
    )
