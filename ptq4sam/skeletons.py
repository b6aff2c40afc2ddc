"""Modules made on the meta device: shapes without values, and without the work of drawing them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_FILL = frozenset({"kaiming_uniform_", "normal_", "uniform_"})
"""Names of what fills a tensor at random."""


@contextlib.contextmanager
def shapes_alone() -> Iterator[None]:
    """Make tensors on the meta device, with random weights not even pretended to be drawn.

    On that device torch draws by decompositions in Python, which import sympy and its compiler: a
    second for each process, and most of what building a large model takes.
    """
    with torch.device("meta"), _Undrawn():
        yield


class _Undrawn(TorchFunctionMode):
    """Tensors that would be filled at random are left as they are."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        arguments: Sequence[Any] = (),
        named: Mapping[str, Any] | None = None,
    ) -> Any:
        named = named or {}
        if function.__name__ in _FILL:
            return arguments[0] if arguments else named["tensor"]
        if function is torch.randn:
            function = torch.empty
        return function(*arguments, **named)
