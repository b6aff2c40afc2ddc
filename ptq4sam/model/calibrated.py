"""The result of a calibration as a file, for reconstructions that all start from it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ptq4sam.errors import CheckpointError
from ptq4sam.files import replacing
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.sam.model import Sam

_FOLDED, _APPLIED = "folded", "applied"


@dataclass(frozen=True)
class CalibratedState:
    """What calibration changed of a model.

    Attributes:
        tensors: quantizers' parameters, and weights that are not the float model's any more.
        folded: names of the attentions whose signs bimodal integration folded.
        applied: by method, paths of what it changed.
    """

    tensors: dict[str, Tensor]
    folded: list[str]
    applied: dict[str, list[str]]

    @classmethod
    def of(cls, quantized: QuantizedSam, sam: Sam) -> CalibratedState:
        """Take it from a calibrated model and the float one that it was made of."""
        known = sam.state_dict()
        changed = {
            name: value
            for name, value in quantized.state_dict().items()
            if name not in known or not torch.equal(value, known[name])
        }
        return cls(changed, list(quantized.folded), dict(quantized.applied))

    def restore(self, quantized: QuantizedSam) -> None:
        """Calibrate a model of the same weights and scheme, with quantizers just inserted.

        Raises:
            CheckpointError: it is another scheme's.
        """
        state = {**quantized.state_dict(), **self.tensors}
        try:
            quantized.load_state_dict(state)
        except RuntimeError as error:
            raise CheckpointError(
                f"a calibration of another scheme was given: {' '.join(str(error).split())[:200]}"
            ) from error
        quantized.folded = list(self.folded)
        quantized.applied = dict(self.applied)

    def save(self, path: Path) -> None:
        """Write it to a safetensors file."""
        tensors = {name: value.contiguous() for name, value in self.tensors.items()}
        said = {_FOLDED: json.dumps(self.folded), _APPLIED: json.dumps(self.applied)}
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata=said)

    @classmethod
    def load(cls, path: Path) -> CalibratedState:
        """Read it.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                said = file.metadata() or {}
                return cls(tensors, json.loads(said[_FOLDED]), json.loads(said[_APPLIED]))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"calibration {path} cannot be read ({error}): delete it to calibrate again"
            ) from error
