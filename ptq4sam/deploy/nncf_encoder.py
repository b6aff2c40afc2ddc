"""The image encoder of an OpenVINO export, quantized by NNCF: the alternative to PTQ4SAM's own way.

As OpenVINO documents it for SAM: INT8 after training, model type transformer, the decoder left
float; and the variant that returns operators to float until an accuracy is met. It is a peer to be
compared with; nothing of ours quantizes here.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ptq4sam.deploy.exported import ExportedSam, open_exported
from ptq4sam.deploy.manifest import ENCODER, Manifest, checksum, read_manifest
from ptq4sam.deploy.targets.openvino import TARGET, refused_writing
from ptq4sam.deploy.targets.target import Arrays, require
from ptq4sam.files import temporary_folder
from ptq4sam.records import Record

_log = logging.getLogger(__name__)

_FORMAT = TARGET.form

Pixels = NDArray[np.float32]
"""A normalised and padded picture [1, 3, side, side]."""


@dataclass(frozen=True)
class NncfSettings(Record):
    """What NNCF is asked for.

    Attributes:
        preset: "mixed" (weights symmetric, activations as fits) or "performance" (all symmetric).
        max_drop: points (hundredths) of the mean IoU that may be lost; None quantizes everything
            that NNCF can.
    """

    preset: Literal["mixed", "performance"] = "mixed"
    max_drop: float | None = None

    def _validate(self) -> None:
        self._require(self.max_drop is None or self.max_drop >= 0, "max_drop", "0 or more")


@dataclass(frozen=True)
class NncfValidation:
    """Where NNCF's accuracy control measures.

    Attributes:
        pictures: how many validation pictures there are.
        score: the mean IoU (0-1) of a model on each of some of them, by place.
    """

    pictures: int
    score: Callable[[ExportedSam, Sequence[int]], list[float]]


def quantize_encoder(
    folder: Path,
    pictures: Sequence[Pixels],
    settings: NncfSettings,
    validation: NncfValidation | None = None,
) -> Manifest:
    """Replace the float encoder of an OpenVINO export by NNCF's INT8 one.

    Args:
        folder: written by `export` with format "openvino" from a float model.
        pictures: calibration pictures; each is asked for when it is needed.
        settings: how.
        validation: needed with `max_drop`.

    Returns:
        The export's new description, which says what NNCF did.

    Raises:
        DependencyError: OpenVINO or NNCF is not installed.
        CheckpointError: the folder holds no such export.
    """
    openvino, nncf = require("openvino"), require("nncf", "openvino")
    manifest = read_manifest(folder, _FORMAT)
    # NNCF reports on each of hundreds of operators.
    logging.getLogger("nncf").setLevel(logging.WARNING)
    core = openvino.Core()
    # Windows replaces no file that is mapped into memory.
    core.set_property({"ENABLE_MMAP": False})
    model = core.read_model(folder / f"{ENCODER}{TARGET.suffixes[0]}")
    common = {
        "model_type": nncf.ModelType.TRANSFORMER,
        "preset": nncf.QuantizationPreset(settings.preset),
        "subset_size": len(pictures),
    }
    data = nncf.Dataset(range(len(pictures)), lambda place: {"image": pictures[place]})
    if settings.max_drop is None or validation is None:
        quantized = nncf.quantize(model, data, **common)
    else:
        whole = range(validation.pictures)
        # Its own forwards on validation pictures rank nothing here: the mean IoU is asked for.
        quantized = nncf.quantize_with_accuracy_control(
            model,
            data,
            nncf.Dataset(whole),
            _validation_function(open_exported(folder, "openvino"), validation),
            max_drop=settings.max_drop / 100,
            drop_type=nncf.DropType.ABSOLUTE,
            **common,
        )
    described = {**asdict(settings), "pictures": len(pictures), "version": nncf.__version__}
    return _replace_encoder(folder, quantized, replace(manifest, nncf=described), openvino)


def _validation_function(
    exported: ExportedSam, validation: NncfValidation
) -> Callable[[Any, Iterable[int]], tuple[float, list[float]]]:
    """What NNCF calls with a compiled encoder and places of pictures."""

    def measure(compiled: Any, places: Iterable[int]) -> tuple[float, list[float]]:
        scores = validation.score(exported.with_encoder(_Compiled(compiled)), list(places))
        mean = float(np.mean(scores))
        _log.info("mean IoU %.4f on %d pictures", mean, len(scores))
        return mean, scores

    return measure


class _Compiled:
    """A compiled encoder as a session, which nobody gives a time."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled

    def run(self, inputs: Arrays, seconds: float | None = None) -> list[NDArray[np.float32]]:
        return [np.array(self._compiled(dict(inputs))["embedding"])]


def _replace_encoder(folder: Path, model: Any, manifest: Manifest, openvino: Any) -> Manifest:
    names = [ENCODER + suffix for suffix in TARGET.suffixes]
    with temporary_folder(folder, "nncf", folder) as temporary:
        with refused_writing(temporary / names[0], (folder / names[-1]).stat().st_size):
            openvino.save_model(model, temporary / names[0], compress_to_fp16=False)
        files = {name: checksum(temporary / name) for name in names}
        for name in names:
            os.replace(temporary / name, folder / name)
    manifest = replace(manifest, files={**manifest.files, **files})
    manifest.write(folder)
    return manifest
