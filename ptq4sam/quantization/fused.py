"""Chains of elementwise operations, compiled so that they pass over memory once.

Quantizing a large tensor is bound by memory: eight operations one after the other read and write it
eight times. torch.compile makes one kernel of them, for a CPU as for a GPU. A kernel takes seconds
to compile, so small tensors, and machines without a compiler, run the same operations one by one.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

_log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

FEWEST_ELEMENTS = 2**20
"""Smallest tensor worth a compiled kernel."""
SWITCH = "PTQ4SAM_COMPILE"
"""Environment variable; 0 runs everything one by one."""


class _Compiler:
    """Whether kernels can be compiled here: found out once, given up at the first failure."""

    def __init__(self) -> None:
        self._usable: bool | None = None

    def usable(self) -> bool:
        """Whether to try."""
        if self._usable is None:
            self._usable = os.environ.get(SWITCH) != "0" and (
                torch.cuda.is_available() or shutil.which(os.environ.get("CXX", "g++")) is not None
            )
        return self._usable

    def give_up(self, error: Exception) -> None:
        """Run one by one from now on, and say so."""
        self._usable = False
        _log.warning(
            "no kernel could be compiled (%s): quantizers take several times as long; a C++ "
            "compiler mends it, %s=0 silences this",
            str(error).strip().splitlines()[-1][:200],
            SWITCH,
        )


_compiler = _Compiler()


def fused(function: Callable[P, R]) -> Callable[P, R]:
    """Compile `function` for calls whose first argument is a large tensor.

    It must be a pure function of tensors and integers: no in-place changes of its arguments, no
    random numbers, numbers that change from call to call as tensors. Where all tensors have one
    shape or are single numbers it sees them flat, so that one kernel serves all shapes.
    """

    @functools.cache
    def compiled() -> Callable[..., Any]:
        # Not at once: it takes a second to load the compiler.
        with _quiet("torch.utils.cpp_extension"):
            importlib.import_module("torch.utils.cpp_extension")
        kernel: Callable[..., Any] = torch.compile(function, dynamic=True, fullgraph=True)
        return kernel

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        large = isinstance(args[0], Tensor) and args[0].numel() >= FEWEST_ELEMENTS
        if not (large and _compiler.usable()):
            return function(*args, **kwargs)
        try:
            result: R = _on_flat(compiled(), *cast(tuple[Any, ...], args))
        except _compiler_errors() as error:
            _compiler.give_up(error)
            return function(*args, **kwargs)
        return result

    return run


def _compiler_errors() -> tuple[type[Exception], ...]:
    """What a compiler that fails raises; looked up only then, for loading it takes a second."""
    from torch._dynamo import exc

    return exc.TorchDynamoException, exc.FailOnRecompileLimitHit


def _on_flat(kernel: Callable[..., Any], first: Tensor, *others: Tensor | int) -> Any:
    """Call a kernel with flat tensors where that is the same; results get their shape back."""
    shape = first.shape
    if any(isinstance(x, Tensor) and x.dim() > 0 and x.shape != shape for x in others):
        return kernel(first, *others)
    flat = [x.reshape(-1) if isinstance(x, Tensor) and x.dim() > 0 else x for x in (first, *others)]
    results = kernel(*flat)
    if isinstance(results, Tensor):
        return results.reshape(shape) if results.dim() > 0 else results
    return tuple(x.reshape(shape) if x.dim() > 0 else x for x in results)


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Hold back warnings of a logger: torch's says that there is no GPU, which is no news."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
