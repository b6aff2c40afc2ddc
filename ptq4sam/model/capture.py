"""Run a model up to a unit and keep what goes into it and comes out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


class _StopForwardError(Exception):
    """Ends a forward pass behind the captured unit; never leaves this module."""


@dataclass
class Captured:
    """Arguments and results of a unit, one entry a call."""

    inputs: list[tuple[Tensor, ...]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


@contextmanager
def _capturing(unit: nn.Module, captured: Captured) -> Iterator[None]:
    def keep(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        captured.inputs.append(tuple(tensor.detach() for tensor in inputs))
        captured.outputs.append(output.detach())
        raise _StopForwardError

    handle = unit.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def capture_unit(unit: nn.Module, runs: list[Callable[[], object]]) -> Captured:
    """Run each of `runs` until `unit` has answered.

    Args:
        unit: module called with tensors as positional arguments.
        runs: one call a calibration picture; each must reach the unit once.

    Returns:
        Inputs and outputs in the order of `runs`.
    """
    captured = Captured()
    with _capturing(unit, captured):
        for run in runs:
            try:
                run()
            except _StopForwardError:
                continue
    return captured
