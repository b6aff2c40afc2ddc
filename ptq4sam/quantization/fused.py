"""Chains of elementwise operations, compiled so that they pass over memory once.

Quantizing a large tensor is bound by memory: eight operations one after the other read and write it
eight times. torch.compile makes one kernel of them, for a CPU as for a GPU. A kernel takes seconds
to compile: small tensors, functions that a run hardly calls, and machines without a compiler run
the same operations one by one.

Compilers divide by approximations and round a product and a sum together where they may. A function
whose values must not depend on that names arguments that are hard to round: at its first use on a
kind of device its kernel is compared with the operations one by one, and is not used there if a
single number differs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn

from ptq4sam.errors import is_out_of_memory

_log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")
Arguments: TypeAlias = tuple[Any, ...]
"""Tensors and integers, the first a tensor."""

FEWEST_ELEMENTS = 2**18
"""Smallest tensor worth a compiled kernel."""
LARGEST_UNCOMPILED = 2**24
"""Smallest tensor whose kernel is compiled at once: one by one it needs its memory many times."""
WORTH_COMPILING = 4.5
"""Seconds that a function may take one by one on large tensors of a CPU before it is compiled.

About what compiling takes, so that no run takes twice as long as it would by the better choice.
"""
SWITCH = "PTQ4SAM_COMPILE"
"""Environment variable; 0 runs everything one by one, 1 compiles at a function's first use."""
_VECTOR_BITS = {"AVX2": 256, "AVX512": 512}
_FUSION = "TRITON_DEFAULT_FP_FUSION"
"""Triton's own; 0 keeps products and sums apart."""


class _Compiler:
    """For which kinds of devices kernels can be compiled: found out once, given up at a failure."""

    def __init__(self) -> None:
        self._usable: dict[str, bool] = {}
        self._told: set[str] = set()

    def usable(self, kind: str) -> bool:
        """Whether to try for "cpu", "cuda", ..."""
        if kind not in self._usable:
            self._usable[kind] = os.environ.get(SWITCH) != "0" and _has_compiler(kind)
        return self._usable[kind]

    def give_up(self, kind: str, error: Exception) -> None:
        """Run one by one on these devices from now on, and say so."""
        self._usable[kind] = False
        _log.warning(
            "no kernel could be compiled for %s (%s): quantizers take several times as long there; "
            "%s mends it, %s=0 silences this",
            kind,
            str(error).strip().splitlines()[-1][:200],
            "a C++ compiler" if kind == "cpu" else "a C compiler beside Python's headers",
            SWITCH,
        )

    def refuse(self, kind: str, name: str) -> None:
        """Say, once for these devices, that a kernel gives other numbers."""
        if kind not in self._told:
            self._told.add(kind)
            _log.warning(
                "a compiled kernel (of %s) gives other numbers on %s than the same operations one "
                "by one: it and others like it are not used there, which takes longer",
                name,
                kind,
            )


_compiler = _Compiler()


def compiles(device: torch.device) -> bool:
    """Whether large tensors on a device are quantized by compiled kernels, as far as is known."""
    return _compiler.usable(device.type)


def _has_compiler(kind: str) -> bool:
    if kind == "cpu":
        return shutil.which(os.environ.get("CXX", "g++")) is not None
    return kind == "cuda" and torch.cuda.is_available()


def fused(function: Callable[P, R]) -> Callable[P, R]:
    """Compile `function` for calls whose first argument is a large tensor.

    It must be a pure function of tensors and integers: no in-place changes of its arguments, no
    random numbers, numbers that change from call to call as tensors. Where all tensors have one
    shape or are single numbers it sees them flat, and as rows where some have one number for each
    index of the first axis, so that one kernel serves all shapes: torch keeps a few of a function.
    """
    return _fused(function, None)


def fused_exactly(
    hard: Callable[..., Iterator[Arguments]],
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """As `fused`, where the kernel must give the bits of the operations one by one.

    Args:
        hard: gives arguments that are hard to round, one set after the other, from those of the
            first call as the kernel sees them: of the same types, integers and number of axes, so
            that nothing else has to be compiled, and of some million elements in all.
    """
    return functools.partial(_fused, hard=hard)


def _fused(
    function: Callable[P, R], hard: Callable[..., Iterator[Arguments]] | None
) -> Callable[P, R]:
    kernel = _Kernel(function, hard)

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        large = isinstance(first, Tensor) and first.numel() >= FEWEST_ELEMENTS
        if not (large and _compiler.usable(cast(Tensor, first).device.type)):
            return function(*args, **kwargs)
        return cast(R, kernel(args))

    return run


class _Kernel:
    """The kernels of one function: one for each kind of device."""

    def __init__(
        self, function: Callable[..., Any], hard: Callable[..., Iterator[Arguments]] | None
    ) -> None:
        self._function, self._hard = function, hard
        self._compiled: dict[str, Callable[..., Any]] = {}
        self._seconds = 0.0

    def __call__(self, args: Arguments) -> Any:
        kind = args[0].device.type
        if self._is_too_early(args[0]):
            started = time.thread_time()
            result = self._function(*args)
            self._seconds += time.thread_time() - started
            return result
        flat = _flattened(args) or _by_rows(args) or tuple(map(_without_name, args))
        try:
            if kind not in self._compiled:
                self._compiled[kind] = self._made(kind, flat)
            return _shaped(self._compiled[kind](*flat), args[0].shape, flat[0].shape)
        except _compiler_errors() as error:
            # Operations one by one would need even more.
            if is_out_of_memory(error):
                raise
            # Of a function torch keeps a few kernels: this call had none, others do.
            if not _is_limit(error):
                _compiler.give_up(kind, error)
            return self._function(*args)

    def _is_too_early(self, x: Tensor) -> bool:
        """Whether the function has not yet taken the time that a kernel for a CPU costs.

        A GPU computes later than it is told to, so that nothing can be timed there.
        """
        if x.device.type != "cpu" or "cpu" in self._compiled or x.numel() >= LARGEST_UNCOMPILED:
            return False
        return self._seconds < WORTH_COMPILING and os.environ.get(SWITCH) != "1"

    def _made(self, kind: str, args: Arguments) -> Callable[..., Any]:
        """The kernel, or the function itself where the kernel does not give its numbers."""
        # Not at once: it takes a second to load the compiler.
        with _quiet("torch.utils.cpp_extension"):
            importlib.import_module("torch.utils.cpp_extension")
        if kind == "cuda":
            # Triton reads it when it compiles, in processes that it starts now.
            os.environ.setdefault(_FUSION, "0")
        options = _options() if kind == "cpu" else {}
        kernel: Callable[..., Any] = torch.compile(
            self._function, dynamic=True, fullgraph=True, options=options
        )
        if self._hard is None:
            return kernel
        if all(_same(kernel(*hard), self._function(*hard)) for hard in self._hard(*args)):
            return kernel
        _compiler.refuse(kind, self._function.__qualname__)
        return self._function


def _same(found: Tensor, expected: Tensor) -> bool:
    """Whether all numbers are equal, or none in both."""
    equal = (found == expected) | (found.isnan() & expected.isnan())
    return bool(equal.all())


def _options() -> dict[str, str | int | bool | Callable[..., Any]]:
    """Of torch.compile: the width of vectors is named, and the C++ compiler is not tested before.

    torch keeps kernels on disk, and does not know them apart by the vector instructions that it
    found by itself: a kernel made for others computes half of its elements. The test of the
    compiler imports torch in a process of its own for each set of vector instructions that the CPU
    has, seconds each; of a compiler that cannot make use of them the first kernel tells.
    """
    config = importlib.import_module("torch._inductor.config")
    options: dict[str, str | int | bool | Callable[..., Any]] = {}
    width = _VECTOR_BITS.get(torch.backends.cpu.get_cpu_capability())
    if width is not None and config.cpp.simdlen is None:
        options["cpp.simdlen"] = width
    if config.cpp.vec_isa_ok is None:
        options["cpp.vec_isa_ok"] = True
    return options


def _without_name(x: Any) -> Any:
    """The same tensor, of which torch does not know that it is a parameter.

    It makes a kernel of its own for each size of a parameter.
    """
    return x.view_as(x) if isinstance(x, nn.Parameter) else x


def _is_limit(error: Exception) -> bool:
    """Whether torch makes no more kernels of a function, for it has made many."""
    from torch._dynamo import exc

    return isinstance(error, exc.FailOnRecompileLimitHit)


def _compiler_errors() -> tuple[type[Exception], ...]:
    """What a compiler that fails raises; looked up only then, for loading it takes a second."""
    from torch._dynamo import exc

    return exc.TorchDynamoException, exc.FailOnRecompileLimitHit


def _flattened(args: Arguments) -> Arguments | None:
    """Flat tensors where that is the same: all have one shape, or are single numbers."""
    shape = args[0].shape
    if any(isinstance(x, Tensor) and x.dim() > 0 and x.shape != shape for x in args):
        return None
    return tuple(x.reshape(-1) if isinstance(x, Tensor) and x.dim() > 0 else x for x in args)


def _by_rows(args: Arguments) -> Arguments | None:
    """Tensors as [rows, n], where others have one number for each index of the first axis.

    Kernels are made anew for other numbers of axes, and for others of length 1: weights of
    convolutions by groups, of 1 x 1 and of 3 x 3 have kinds of their own.
    """
    shape = args[0].shape
    of_rows = (shape[0], *(1,) * (len(shape) - 1)) if shape else ()
    tensors = [x for x in args if isinstance(x, Tensor) and x.dim() > 0]
    if len(shape) < 2 or any(tuple(x.shape) not in (tuple(shape), of_rows) for x in tensors):
        return None
    return tuple(
        x.reshape(len(x), -1) if isinstance(x, Tensor) and x.dim() > 0 else x for x in args
    )


def _shaped(results: Any, shape: torch.Size, seen: torch.Size) -> Any:
    """Results as if the first tensor had not been flat, or rows; single numbers stay so.

    Args:
        results: of a kernel, a tensor or several.
        shape: of the first tensor.
        seen: its shape as the kernel saw it.
    """
    if shape == seen:
        return results
    if not isinstance(results, Tensor):
        return tuple(_shaped(x, shape, seen) for x in results)
    if results.dim() == 0:
        return results
    return results.reshape(shape if results.shape == seen else (-1, *(1,) * (len(shape) - 1)))


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
