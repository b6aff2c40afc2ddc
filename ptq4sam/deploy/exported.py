"""Exported models, to be used as a SAM in torch is."""

from __future__ import annotations

import copy
import functools
import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ptq4sam.deploy.manifest import DECODER, ENCODER, Manifest, read_manifest
from ptq4sam.deploy.products import exact_products
from ptq4sam.deploy.targets import TARGETS
from ptq4sam.deploy.targets.target import Precision, Products, Session
from ptq4sam.errors import ConfigError
from ptq4sam.sam.geometry import Geometry
from ptq4sam.sam.model import Features, normalize, resize_masks

_log = logging.getLogger(__name__)

_FLOAT_BYTES = 4


class ExportedSam:
    """A SAM in files, run by ONNX Runtime or OpenVINO on the CPU; give it to `Predictor`.

    Attributes:
        name: of the SAM.
        manifest: what it is.
        runtime: "onnxruntime" or "openvino".
        products: how codes are multiplied, so that an exact export is exact on this processor; None
            for any other.
    """

    def __init__(self, folder: Path, runtime: str, precision: Precision = "f32") -> None:
        """Open the files of a folder; see `open_exported`."""
        target = TARGETS[runtime]
        self.manifest: Manifest = read_manifest(folder, target.form)
        whole = self.manifest.exact or self.manifest.products is not None
        if whole and precision != "f32":
            raise ConfigError(
                f"precision {precision!r} was asked for, but {folder} holds a model of whole "
                "numbers, which is one in f32: write a fast export"
            )
        self.runtime = runtime
        self.name = self.manifest.model
        self.products: Products | None = None
        if whole:
            self.products = exact_products(target, self.manifest.products)
            _log.info("%s multiplies codes in %s: exact on this processor", runtime, self.products)
        suffix = target.suffixes[0]
        self._encoder, self._decoder = (
            target.open(folder / f"{part}{suffix}", outputs, precision, self.products)
            for part, outputs in ((ENCODER, ["embedding"]), (DECODER, ["low_res", "iou"]))
        )
        self._mean, self._std = (
            torch.tensor(values, device=self.device).view(-1, 1, 1)
            for values in (self.manifest.pixel_mean, self.manifest.pixel_std)
        )

    def with_encoder(self, encoder: Session) -> ExportedSam:
        """The same model with another graph for `image` to `embedding`."""
        changed = copy.copy(self)
        changed._encoder = encoder
        return changed

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels."""
        return self.manifest.image_size

    @property
    def geometry(self) -> Geometry:
        """Of its pictures."""
        return self.manifest.geometry

    @property
    def device(self) -> torch.device:
        """Where tensors are taken and given: the CPU."""
        return torch.device("cpu")

    @property
    def mask_input_size(self) -> tuple[int, int]:
        """(height, width) of a mask prompt and of low-resolution masks."""
        return self.manifest.mask_input

    @property
    def embedding_bytes(self) -> int:
        """Bytes of one picture's embedding."""
        channels, rows, columns = self.manifest.embedding
        return _FLOAT_BYTES * channels * rows * columns

    def preprocess(self, pixels: Tensor) -> Tensor:
        """Normalise [..., 3, height, width] (0-255) and pad it at the right and bottom."""
        return normalize(pixels, self._mean, self._std, self.image_size)

    def embed(self, pixels: Tensor, seconds: float | None = None) -> Features:
        """Preprocessed pictures [batch, 3, side, side] to ([batch, channels, rows, columns],).

        Args:
            pixels: the pictures.
            seconds: that each may take; None for any time.

        Raises:
            TimeoutError: one took longer.
        """
        features = [
            self._encoder.run({"image": picture[None]}, seconds)[0] for picture in pixels.numpy()
        ]
        return (torch.from_numpy(np.concatenate(features)),)

    def decode(
        self,
        features: Features,
        points: tuple[Tensor, Tensor] | None,
        boxes: Tensor | None,
        masks: Tensor | None,
        multimask: bool,
    ) -> tuple[Tensor, Tensor]:
        """Masks of prompts on one picture; arguments and result as for `Sam.decode`."""
        given = [x for x in (points and points[0], boxes, masks) if x is not None]
        count = len(given[0]) if given else 1
        new = functools.partial(torch.zeros, device=self.device)
        coordinates, labels = points or (new(count, 0, 2), new(count, 0))
        if points is not None and boxes is None:
            # Points without a box are followed by a "not a point", as SAM was trained.
            coordinates = torch.cat([coordinates, coordinates.new_zeros(count, 1, 2)], dim=1)
            labels = torch.cat([labels, -labels.new_ones(count, 1)], dim=1)
        no_mask = new(1, 1, *self.mask_input_size)
        inputs = {
            "embedding": features[0],
            "points": coordinates.float(),
            "labels": labels.long(),
            "boxes": new(count, 0, 4) if boxes is None else boxes[:, None],
            "mask": no_mask if masks is None else masks,
            "has_mask": torch.tensor([0.0 if masks is None else 1.0], device=self.device),
            "multimask": torch.tensor([int(multimask)], device=self.device),
            # Only for masks at full size, which `Predictor` makes itself within its memory.
            "original_size": torch.tensor([self.image_size] * 2, device=self.device),
        }
        arrays = {name: tensor.contiguous().numpy() for name, tensor in inputs.items()}
        low_res, ious = self._decoder.run(arrays)
        return torch.from_numpy(low_res), torch.from_numpy(ious)

    def postprocess_masks(
        self, masks: Tensor, input_size: tuple[int, int], original_size: tuple[int, int]
    ) -> Tensor:
        """Resize mask logits to the original picture; see `Sam.postprocess_masks`."""
        return resize_masks(masks, self.geometry.prompt_side, input_size, original_size)


def open_exported(folder: str | Path, runtime: str, precision: Precision = "f32") -> ExportedSam:
    """Open a model that `export` wrote.

    Args:
        folder: where it is.
        runtime: "onnxruntime" or "openvino".
        precision: of what is not integer: "f32", which agrees with the simulation, or "bf16", which
            is faster in OpenVINO on a processor that has it.

    Raises:
        ConfigError: there is no such runtime, or it or the export has no such precision.
        CheckpointError: the folder has no export of the runtime's format, or a damaged one.
        DependencyError: the runtime is not installed.
        DeployError: the export is exact, but the runtime is not on this processor.
    """
    if runtime not in TARGETS:
        raise ConfigError(f"runtime {runtime!r} was asked for: use {' or '.join(TARGETS)}")
    if precision not in TARGETS[runtime].precisions:
        known = (f"{name} has {' and '.join(t.precisions)}" for name, t in TARGETS.items())
        raise ConfigError(f"precision {precision!r} was asked for in {runtime}: {', '.join(known)}")
    return ExportedSam(Path(folder), runtime, precision)
