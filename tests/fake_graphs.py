"""CUDA graphs without a GPU: operations are written down, and made again in the same memory.

As on a GPU, numbers of Python stay what they were when a step was recorded, nothing of a step is
done while it is recorded, and neither what reads a number of a tensor nor what makes a tensor of
numbers of the host can be.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_FROM_HOST = (torch.tensor, torch.as_tensor, torch.from_numpy, Tensor.new_tensor)
_WAITING = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)


class FakeGraphs:
    """Records work on a CPU.

    Attributes:
        recorded: how many recordings there are.
        replayed: how often one was replayed.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._inside = False
        self.recorded = self.replayed = 0

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        self._inside = True
        yield
        self._inside = False

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        assert self._inside
        drawn = self._generator.get_state()
        operations = _Operations()
        try:
            with _NoHostData(), operations:
                result = work()
        finally:
            operations.take_back()
            self._generator.set_state(drawn)
        self.recorded += 1
        result.fill_(torch.nan)

        def replay() -> None:
            assert self._inside
            self.replayed += 1
            operations.repeat()

        return result, replay


class _NoHostData(TorchFunctionMode):
    """What is copied from the host's ordinary memory cannot be recorded."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _FROM_HOST:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    """Operations in order, each with the tensors that it was given and that it gave."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self._own: set[int] = set()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in _WAITING:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        given = _tensors((args, kwargs))
        if func._schema.is_mutable:
            for tensor in given:
                if _memory(tensor) not in self._own:
                    self._before.setdefault(id(tensor), (tensor, tensor.detach().clone()))
        result = func(*args, **kwargs)
        known = {_memory(tensor) for tensor in given}
        new = [tensor for tensor in _tensors(result) if _memory(tensor) not in known]
        self._own |= {_memory(tensor) for tensor in new}
        self._made.append((func, args, kwargs, _tensors(result)))
        return result

    def take_back(self) -> None:
        """What was written over is as before."""
        with torch.no_grad():
            for tensor, before in self._before.values():
                tensor.copy_(before)

    @torch.no_grad()
    def repeat(self) -> None:
        """All again; results go where they went."""
        for func, args, kwargs, results in self._made:
            for into, found in zip(results, _tensors(func(*args, **kwargs)), strict=True):
                if _memory(into) != _memory(found):
                    into.copy_(found)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
