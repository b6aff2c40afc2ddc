"""Any of torchvision's detection models."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ptq4sam import numerics
from ptq4sam.data.images import ImageRecord, reason
from ptq4sam.errors import CheckpointError, ConfigError
from ptq4sam.nearest import nearest
from ptq4sam.pickles import UNREADABLE, load_pickle
from ptq4sam.prompts.detections import candidates, file_digest, package_version
from ptq4sam.prompts.record import Prompts, clean


class TorchvisionDetector:
    """Prompt source: boxes of a torchvision detection model.

    The model's labels are taken as the data set's category ids, as they are in torchvision's COCO
    weights: these have 91 classes, of which 0 is the background and 11 are none of COCO's 80
    categories. Boxes of a category that the data set lacks cannot score; an evaluation counts them
    in a warning.

    Args:
        model: a name of `torchvision.models.detection`, or a module that maps a list of RGB
            pictures [3, h, w] in 0-1 to a list of {"boxes", "scores", "labels"}.
        checkpoint: state dict for a named model; None takes torchvision's own weights where they
            are here already (see `own_weights`): nothing is downloaded.
        score_threshold: detections at or below it are dropped.
        limit: keep at most so many boxes a picture.
        device: where it runs.

    Raises:
        ConfigError: torchvision has no such model.
        CheckpointError: the weights are missing or do not fit.
        DependencyError: torchvision is not installed.
    """

    name = "torchvision"

    def __init__(
        self,
        model: str | nn.Module,
        checkpoint: Path | None = None,
        score_threshold: float = 0.01,
        limit: int = 100,
        device: torch.device | str = "cpu",
    ) -> None:
        self.score_threshold, self.limit = score_threshold, limit
        self._given, self._device = model, torch.device(device)
        if isinstance(model, nn.Module):
            self._identity = _state_digest(model)
        else:
            version = _version()
            self._checkpoint = own_weights(model) if checkpoint is None else checkpoint
            self._identity = f"{model} {file_digest(self._checkpoint)} torchvision {version}"

    def fingerprint(self) -> str:
        """Identifies model, weights, settings and device."""
        place = numerics.fingerprint(self._device)
        return f"{self._identity} {self.score_threshold} {self.limit} {place}"

    @torch.no_grad()
    def prompts(self, record: ImageRecord, image: NDArray[np.uint8]) -> Prompts:
        """Boxes of an RGB picture [height, width, 3], best first."""
        pixels = torch.from_numpy(np.array(image)).to(self._device).permute(2, 0, 1)
        found: dict[str, Any] = self._model([pixels.float() / 255.0])[0]
        sure = candidates(found["scores"], self.score_threshold)
        boxes, scores, labels = (
            found[k][sure].cpu().numpy() for k in ("boxes", "scores", "labels")
        )
        return clean(record, boxes, scores, labels, self.limit)

    @cached_property
    def _model(self) -> nn.Module:
        if isinstance(self._given, nn.Module):
            return self._given.eval().to(self._device)
        return _build(self._given, self._checkpoint).eval().to(self._device)


def own_weights(name: str) -> Path:
    """Where torchvision's own weights of a model are, or are put by `ptq4sam download`.

    torchvision's programs keep them in torch's cache: they are taken from there too.

    Raises:
        ConfigError: torchvision has no such model.
        DependencyError: torchvision is not installed.
    """
    _version()
    models = _models(name)
    file: str = models.get_model_weights(name).DEFAULT.url.rpartition("/")[2]
    kept = Path(torch.hub.get_dir()) / "checkpoints" / file
    return kept if kept.is_file() else Path("ckpt") / file


def _models(name: str) -> Any:
    """The module torchvision.models, if a detector of that name is among them."""
    from torchvision import models

    names = models.list_models(module=models.detection)
    if name not in names:
        near = nearest(name, names)
        hint = f"did you mean {near}?" if near else f"there are {', '.join(names)}"
        raise ConfigError(f"torchvision has no detection model {name!r}: {hint}")
    return models


def _build(name: str, checkpoint: Path) -> nn.Module:
    model: nn.Module = _models(name).get_model(name, weights=None, weights_backbone=None)
    try:
        state = load_pickle(checkpoint)
        # torchvision's training script keeps the weights under "model".
        model.load_state_dict(state.get("model", state))
    except UNREADABLE as error:
        raise CheckpointError(f"{checkpoint} has no weights of {name}: {reason(error)}") from error
    return model


def _state_digest(model: nn.Module) -> str:
    digest = hashlib.sha256(type(model).__name__.encode())
    for key, value in model.state_dict().items():
        digest.update(key.encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _version() -> str:
    return package_version("torchvision", "pip install torchvision")
