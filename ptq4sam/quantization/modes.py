"""Temporary modes of quantizers: context managers that put back what they found."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn

from ptq4sam.quantization.base import Mode, Quantizer, Statistics

WEIGHT_QUANTIZER = "weight_quantizer"
"""Name under which every layer holds the quantizer of its weight."""


def quantizers(module: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """Every quantizer in `module` with its path, itself included, in order of registration."""
    for name, child in module.named_modules():
        if isinstance(child, Quantizer):
            yield name, child


def has_quantizers(module: nn.Module) -> bool:
    """Whether anything in `module` is quantized."""
    return any(True for _ in quantizers(module))


@contextlib.contextmanager
def quantizer_mode(
    module: nn.Module, mode: Mode, select: Callable[[Quantizer], bool] | None = None
) -> Iterator[None]:
    """Quantizers below `module` are in `mode` within the `with` block.

    Args:
        module: a model, a part of one, or a quantizer.
        mode: what they do meanwhile.
        select: which of them; all by default.
    """
    chosen = [q for _, q in quantizers(module) if select is None or select(q)]
    before = [quantizer.mode for quantizer in chosen]
    try:
        for quantizer in chosen:
            quantizer.mode = mode
        yield
    finally:
        for quantizer, found in zip(chosen, before, strict=True):
            quantizer.mode = found


@contextlib.contextmanager
def dropping(
    module: nn.Module, probability: float, generator: torch.Generator | None
) -> Iterator[None]:
    """Quantizers of activations let elements through as they are, at random (QDrop).

    Those of weights, which layers hold as `weight_quantizer`, stay as they are.

    Args:
        module: the unit under reconstruction.
        probability: of an element staying float, 0 to 1.
        generator: source of the choice; None is torch's own.
    """
    chosen = [
        quantizer
        for path, quantizer in quantizers(module)
        if path.rpartition(".")[2] != WEIGHT_QUANTIZER
    ]
    before = [(quantizer.drop_probability, quantizer.generator) for quantizer in chosen]
    try:
        for quantizer in chosen:
            quantizer.drop_probability, quantizer.generator = probability, generator
        yield
    finally:
        for quantizer, found in zip(chosen, before, strict=True):
            quantizer.drop_probability, quantizer.generator = found


@contextlib.contextmanager
def recording(module: nn.Module) -> Iterator[dict[str, list[Statistics]]]:
    """Quantizers that observe within the `with` block keep what they see for `merge_recorded`.

    Yields:
        Statistics of every batch, by the path of the quantizer.
    """
    found = dict(quantizers(module))
    before = {name: quantizer.recorded for name, quantizer in found.items()}
    record: dict[str, list[Statistics]] = {name: [] for name in found}
    try:
        for name, quantizer in found.items():
            quantizer.recorded = record[name]
        yield record
    finally:
        for name, quantizer in found.items():
            quantizer.recorded = before[name]


def merge_recorded(module: nn.Module, record: dict[str, list[Statistics]]) -> None:
    """Set scales by what `recording` kept."""
    for name, quantizer in quantizers(module):
        for statistics in record[name]:
            quantizer.merge(statistics)
