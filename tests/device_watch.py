"""What code asks of devices: tensors made without saying where, and numbers read by the host."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import ptq4sam

PACKAGE = Path(ptq4sam.__file__).parent
FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "logspace"),
    *("normal", "ones", "rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros"),
)
"""Functions of torch that make tensors on its default device where none is named."""

_FACTORIES = {getattr(torch, name): name for name in FACTORIES}
_READS = {
    getattr(Tensor, name)
    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__")
}


class DefaultDevice(TorchFunctionMode):
    """Records calls of factories from the package that name no device.

    Constructors of modules are allowed to: they follow `with torch.device(...)`, as torch's own do,
    and whoever builds a model moves it.

    Attributes:
        found: file, line and function of each such place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FACTORIES and kwargs.get("device") is None:
            frame = sys._getframe(1)
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(PACKAGE) and not _builds_a_module(frame):
                place = f"{path.relative_to(PACKAGE)}:{frame.f_lineno}"
                self.found.add(f"{place} torch.{_FACTORIES[func]}")
        return func(*args, **kwargs)


def _builds_a_module(frame: FrameType) -> bool:
    constructed = frame.f_locals.get("self")
    return frame.f_code.co_name == "__init__" and isinstance(constructed, nn.Module)


class _Methods(TorchFunctionMode):
    """Methods that give a number of a tensor to the host."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _READS:
            self._found[_caller()] += 1
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    """Operations whose result has a shape that only values tell: the host waits for it."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        shaped_by_mask = func.overloadpacket is torch.ops.aten.index and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if shaped_by_mask or func.overloadpacket in (
            torch.ops.aten.nonzero,
            torch.ops.aten.masked_select,
            torch.ops.aten.unique_consecutive,
            torch.ops.aten._unique2,
        ):
            self._found[f"{_caller()} {func}"] += 1
        return func(*args, **(kwargs or {}))


def _caller() -> str:
    """The innermost line of the package that runs."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            return f"{path.relative_to(PACKAGE)}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside"


@contextlib.contextmanager
def host_reads() -> Iterator[Counter[str]]:
    """Where the host reads numbers of tensors within the `with` block, and how often.

    On a GPU each of them waits until all work before is done.
    """
    found: Counter[str] = Counter()
    with _Methods(found), _Operations(found):
        yield found
