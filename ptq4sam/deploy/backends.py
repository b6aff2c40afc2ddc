"""Models by what runs them, and which of them is the fastest here."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import torch

from ptq4sam.deploy.container import is_quantized_file
from ptq4sam.deploy.exported import ExportedSam, open_exported
from ptq4sam.deploy.manifest import find_export, formats
from ptq4sam.deploy.products import advice
from ptq4sam.deploy.reference import integer_model
from ptq4sam.deploy.storage import load
from ptq4sam.deploy.targets import TARGETS
from ptq4sam.deploy.targets.target import PRECISIONS, Precision, require
from ptq4sam.errors import CheckpointError, ConfigError, DependencyError
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.sam.model import Sam

_log = logging.getLogger(__name__)

TORCH, INTEGER = "torch", "integer"
BACKENDS = (INTEGER, *TARGETS)
_GONE = {
    "torch-int8": "torch, which multiplies in int8 by itself where the processor is fast at that"
}
"""Backends of earlier versions, and what to use instead."""
AUTO = "auto"
CHOICE_SECONDS = 20.0
"""Time that "auto" has to measure runtimes, once the likeliest one is open."""
_LIKELIEST = ("openvino", "onnxruntime")
"""Runtimes, the one first that is the fastest as a rule (docs/deployment.md)."""

Deployed = ExportedSam | Sam
"""A model that is not simulated: exported, or on integers in torch."""


def check_backend(backend: str, precision: str = "f32") -> None:
    """Whether there is such a backend: a check that needs neither files nor data.

    Raises:
        ConfigError: there is none, or none of that precision.
    """
    if backend in _GONE:
        raise ConfigError(f"there is no backend {backend} any more: use {_GONE[backend]}")
    if backend not in (TORCH, AUTO, *BACKENDS):
        raise ConfigError(
            f"backend {backend!r} was asked for: use {TORCH}, {', '.join(BACKENDS)} or {AUTO}"
        )
    if precision not in PRECISIONS or (precision != "f32" and backend not in ("openvino", AUTO)):
        raise ConfigError(
            f"precision {precision!r} was asked for in {backend}: openvino has "
            f"{' and '.join(PRECISIONS)}, the others f32"
        )


def choose_backend(checkpoint: Path | None, asked: str | None) -> tuple[Path | None, str]:
    """What runs a checkpoint where nothing was asked for, and the folder of an exported model.

    Args:
        checkpoint: weights, a quantized file, the folder of an exported model or a file in it.
        asked: a backend; None for what fits the checkpoint.

    Returns:
        The checkpoint, of an exported model its folder, and the backend.

    Raises:
        ConfigError: an exported model is to be run by torch.
    """
    found = None if checkpoint is None else find_export(checkpoint)
    if found is None:
        return checkpoint, asked or TORCH
    folder, there = found
    if asked == TORCH:
        raise ConfigError(
            f"{folder} is an exported model ({', '.join(there)}), which torch does not run: score "
            "it without naming a backend, or give the file that was exported"
        )
    if asked is not None:
        return folder, asked
    runtimes = [runtime for runtime, target in TARGETS.items() if target.form in there]
    chosen = next((runtime for runtime in runtimes if find_spec(runtime)), runtimes[0])
    others = "" if len(runtimes) == 1 else f" (it has {' and '.join(there)}; name it for another)"
    _log.info("%s is an exported model: backend %s%s", folder, chosen, others)
    return folder, chosen


def open_backend(checkpoint: str | Path, backend: str, precision: str = "f32") -> Deployed:
    """Open a deployed model.

    Args:
        checkpoint: for "integer" a file written by `save`, for runtimes a folder written by
            `export`, for "auto" any of them.
        backend: one of BACKENDS, or "auto" for the one that encodes a picture fastest, which is
            measured for CHOICE_SECONDS at most. "integer" is the reference, exact and slow.
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
    if backend == INTEGER:
        return integer_model(_quantized(path, backend))
    return open_exported(path, backend, cast(Precision, precision))


def _quantized(path: Path, backend: str) -> QuantizedSam:
    if not is_quantized_file(path):
        raise CheckpointError(
            f"{path} is no quantized model, which {backend} needs: write one with ptq4sam quantize"
        )
    return load(path)


def _fastest(path: Path, precision: str) -> Deployed:
    """What encodes a picture in the least time, as far as can be told in CHOICE_SECONDS."""
    if not path.is_dir():
        # Of a file there is the simulation alone, which computes what a device does.
        return _quantized(path, AUTO)
    candidates = _candidates(path)
    if not candidates:
        raise CheckpointError(
            f"nothing here can run {path}: export it with ptq4sam export, and install "
            "'ptq4sam[onnx]' or 'ptq4sam[openvino]'"
        )
    models = (_open_exported(path, backend, precision) for backend in candidates)
    chosen = next(models)
    if len(candidates) > 1:
        chosen = _measured(chosen, models, candidates[1:])
    _log.info("chosen: %s", chosen.runtime)
    return chosen


def _measured(first: ExportedSam, others: Iterator[ExportedSam], names: list[str]) -> ExportedSam:
    """The fastest of several models; the first where none shows itself in time.

    Args:
        first: open already, which would be needed anyway.
        others: opened when they are asked for, which takes a part of the time.
        names: of those.
    """
    ends = time.monotonic() + CHOICE_SECONDS
    chosen, fastest = first, encoding_seconds(first, CHOICE_SECONDS / (1 + len(names)))
    for name in names:
        model = next(others) if time.monotonic() < ends else None
        left = ends - time.monotonic()
        if model is None or left <= 0:
            _log.info("%s was not measured: the %.0f s for it are over", name, CHOICE_SECONDS)
            continue
        seconds = encoding_seconds(model, left)
        if seconds is not None and (fastest is None or seconds < fastest):
            chosen, fastest = model, seconds
    if fastest is None:
        _log.info("nothing is known: %s is the fastest as a rule", chosen.runtime)
    return chosen


def _open_exported(path: Path, runtime: str, precision: str) -> ExportedSam:
    """A runtime's model; a precision is OpenVINO's alone."""
    own = precision if runtime == "openvino" else "f32"
    model = open_exported(path, runtime, cast(Precision, own))
    in_codes = model.manifest.scheme is not None or model.manifest.nncf is not None
    if in_codes and (told := advice(TARGETS[runtime])) is not None:
        _log.info(told)
    return model


def _candidates(path: Path) -> list[str]:
    """The runtimes that are installed and have files in a folder, the likeliest one first."""
    there, candidates = formats(path), []
    for runtime in _LIKELIEST:
        if TARGETS[runtime].form not in there:
            continue
        try:
            require(runtime, TARGETS[runtime].form)
        except DependencyError as error:
            _log.info("%s was not tried: %s", runtime, error)
        else:
            candidates.append(runtime)
    return candidates


def encoding_seconds(model: ExportedSam, limit: float, rounds: int = 3) -> float | None:
    """Median seconds of encoding a picture of noise, after one that does not count.

    Args:
        model: encodes.
        limit: seconds for all; fewer rounds are made where it is not enough.
        rounds: how many.

    Returns:
        None where not even one ends in time.
    """
    pixels = torch.randn(1, 3, model.image_size, model.image_size, device=model.device)
    ends = time.perf_counter() + limit
    times: list[float] = []
    while len(times) <= rounds and (left := ends - time.perf_counter()) > 0:
        started = time.perf_counter()
        try:
            model.embed(pixels, left)
        except TimeoutError:
            break
        times.append(time.perf_counter() - started)
    if not times:
        _log.info("%s takes more than %.1f s for a picture", model.runtime, limit)
        return None
    seconds = statistics.median(times[1:] or times)
    _log.info("%s encodes a picture in %.3f s", model.runtime, seconds)
    return seconds
