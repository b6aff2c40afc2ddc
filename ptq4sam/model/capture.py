"""Run a unit up to one of its layers and take what goes into the layer and comes out of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class _StopForwardError(Exception):
    """Ends a forward pass behind the captured layer; never leaves this module."""


@torch.no_grad()
def capture_call(layer: nn.Module, run: Callable[[], object]) -> tuple[tuple[Tensor, ...], Tensor]:
    """Run until `layer` has answered, and no further.

    Args:
        layer: module called with tensors as positional arguments.
        run: must reach the layer.

    Returns:
        The layer's arguments and its answer.
    """
    calls: list[tuple[tuple[Tensor, ...], Tensor]] = []

    def keep(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append((inputs, output))
        raise _StopForwardError

    handle = layer.register_forward_hook(keep)
    try:
        run()
    except _StopForwardError:
        pass
    finally:
        handle.remove()
    return calls[0]
