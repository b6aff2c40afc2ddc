"""Models by what runs them, and which of them is the fastest here."""

from __future__ import annotations

import logging
import statistics
import time
from pathlib import Path
from typing import cast

import torch

from ptq4sam.deploy.container import is_quantized_file
from ptq4sam.deploy.exported import ExportedSam, open_exported
from ptq4sam.deploy.integer import integer_model
from ptq4sam.deploy.manifest import formats
from ptq4sam.deploy.runtimes import PRECISIONS, RUNTIMES, Precision
from ptq4sam.deploy.storage import load
from ptq4sam.deploy.torch_int8 import with_integer_products
from ptq4sam.errors import CheckpointError, ConfigError, DependencyError
from ptq4sam.sam.model import PromptableModel, Sam

_log = logging.getLogger(__name__)

TORCH, INTEGER, TORCH_INT8 = "torch", "integer", "torch-int8"
BACKENDS = (INTEGER, TORCH_INT8, *RUNTIMES)
AUTO = "auto"

Deployed = ExportedSam | Sam
"""A model that is not simulated: exported, or on integers in torch."""


def check_backend(backend: str, precision: str = "f32") -> None:
    """Whether there is such a backend: a check that needs neither files nor data.

    Raises:
        ConfigError: there is none, or none of that precision.
    """
    if backend not in (TORCH, AUTO, *BACKENDS):
        raise ConfigError(
            f"backend {backend!r} was asked for: use {TORCH}, {', '.join(BACKENDS)} or {AUTO}"
        )
    if precision not in PRECISIONS or (precision != "f32" and backend not in ("openvino", AUTO)):
        raise ConfigError(
            f"precision {precision!r} was asked for in {backend}: openvino has "
            f"{' and '.join(PRECISIONS)}, the others f32"
        )


def open_backend(checkpoint: str | Path, backend: str, precision: str = "f32") -> Deployed:
    """Open a deployed model.

    Args:
        checkpoint: for "integer" and "torch-int8" a file written by `save`, for runtimes a folder
            written by `export`, for "auto" any of them.
        backend: one of BACKENDS, or "auto" for the one that encodes a picture fastest. "integer" is
            the reference, exact and slow; "torch-int8" has fast integer products in torch.
        precision: of what OpenVINO does not compute in integers, see `open_exported`.

    Raises:
        ConfigError: there is no such backend or precision.
        CheckpointError: the checkpoint cannot be run by it.
        DependencyError: the runtime is not installed.
    """
    check_backend(backend, precision)
    path = Path(checkpoint)
    if backend == AUTO:
        return _fastest(path, precision)
    if backend in (INTEGER, TORCH_INT8):
        if not is_quantized_file(path):
            raise CheckpointError(
                f"{path} is no quantized model, which {backend} needs: write one with ptq4sam "
                "quantize"
            )
        quantized = load(path)
        return integer_model(quantized) if backend == INTEGER else with_integer_products(quantized)
    return open_exported(path, backend, cast(Precision, precision))


def _fastest(path: Path, precision: str) -> Deployed:
    """The candidate that encodes a picture in the least time."""
    if path.is_dir():
        there = formats(path)
        candidates = [runtime for runtime, known in RUNTIMES.items() if known in there]
    else:
        candidates = [TORCH_INT8]
    seconds: dict[str, float] = {}
    models: dict[str, Deployed] = {}
    for backend in candidates:
        try:
            own = precision if backend == "openvino" else "f32"
            models[backend] = open_backend(path, backend, own)
        except DependencyError as error:
            _log.info("not tried: %s", error)
            continue
        seconds[backend] = encoding_seconds(models[backend])
        _log.info("%s encodes a picture in %.3f s", backend, seconds[backend])
    if not seconds:
        raise CheckpointError(
            f"nothing here can run {path}: export it with ptq4sam export, and install "
            "'ptq4sam[onnx]' or 'ptq4sam[openvino]'"
        )
    return models[min(seconds, key=seconds.__getitem__)]


@torch.no_grad()
def encoding_seconds(model: PromptableModel, rounds: int = 3) -> float:
    """Median seconds of encoding a picture of noise, after one that does not count."""
    pixels = torch.randn(1, 3, model.image_size, model.image_size, device=model.device)
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        model.embed(pixels)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])
