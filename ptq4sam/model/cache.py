"""Where captured activations live: in memory as long as a budget lasts, then on disk."""

from __future__ import annotations

import logging
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import torch
from torch import Tensor

from ptq4sam.errors import ResourceError, reason
from ptq4sam.model.memory import free_memory

_log = logging.getLogger(__name__)

_SHARE_OF_FREE = 0.5
"""Share of what is free that a cache takes by default; the model at work needs the rest."""

_PREFIX = "activations."
"""Beginning of the name of a cache's folder."""


class ActivationCache:
    """Keeps tensors for a while and hands them back on the device that computes.

    On a GPU tensors stay there within the budget, then move to host memory as far as half of that
    is free, then to disk. On a CPU they stay in memory within the budget, then go to disk. Host
    memory that a CUDA device copies from is pinned: from other memory a copy would be slow, and the
    host would wait for it.

    Args:
        device: where tensors are handed back.
        budget: bytes of the device's memory; None for half of what is free, less if the rest were
            not enough for `reserve`.
        folder: receives a temporary folder for what goes to disk, and loses what a killed run left
            there; None for the system's own place.
        reserve: bytes of a GPU's memory that the model at work needs.
    """

    def __init__(
        self,
        device: torch.device,
        budget: int | None = None,
        folder: Path | None = None,
        reserve: int = 0,
    ) -> None:
        self.device = device
        on_device = device.type != "cpu"
        if budget is None:
            free = free_memory(device)
            kept_free = reserve if on_device else 0
            budget = max(0, min(int(free * _SHARE_OF_FREE), free - kept_free))
        self.budget = budget
        host = int(free_memory(torch.device("cpu")) * _SHARE_OF_FREE) if on_device else 0
        self._memory = [_Memory(device, self.budget), _Memory(torch.device("cpu"), host)]
        self._parent = folder
        self._folder: Path | None = None

    def keep(
        self, tensors: Sequence[Tensor], known: Sequence[tuple[Tensor, Kept]] = ()
    ) -> tuple[Kept, ...]:
        """Keep tensors; one that is given several times, or is known already, is kept once.

        Args:
            tensors: on any device.
            known: tensors that may be among them, with what keeps them.

        Raises:
            ResourceError: neither memory nor the disk has room.
        """
        places = [*known]
        kept = []
        for tensor in tensors:
            place = next((place for other, place in places if other is tensor), None)
            if place is None:
                place = self._place(tensor.detach())
                places.append((tensor, place))
            kept.append(place)
        return tuple(kept)

    @property
    def memory_bytes(self) -> int:
        """Bytes of the device's memory now in use."""
        return self._memory[0].used

    def _place(self, tensor: Tensor) -> Kept:
        size = tensor.numel() * tensor.itemsize
        for memory in self._memory:
            if memory.used + size <= memory.budget:
                return _InMemory(tensor, memory, self.device)
        return _OnDisk(tensor, self._disk(), self.device)

    def _disk(self) -> Path:
        if self._folder is None:
            for left in self._parent.glob(f"{_PREFIX}*") if self._parent else ():
                shutil.rmtree(left, ignore_errors=True)
            self._folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self._parent))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
            _log.info("the memory budget is used up: activations go to %s", self._folder)
        return self._folder


class Kept:
    """A tensor that a cache keeps; dropped with the last reference."""

    def load(self) -> Tensor:
        """The tensor on the computing device."""
        raise NotImplementedError


def load_all(kept: Sequence[Kept]) -> tuple[Tensor, ...]:
    """Load tensors; what is kept once is loaded once."""
    loaded = {id(place): place.load() for place in kept}
    return tuple(loaded[id(place)] for place in kept)


class KeptSequence(Sequence[tuple[Tensor, ...]]):
    """Kept tensors of several pictures, loaded when one is asked for."""

    def __init__(self, items: Sequence[Sequence[Kept]]) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> tuple[Tensor, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[tuple[Tensor, ...]]: ...
    def __getitem__(self, index: int | slice) -> tuple[Tensor, ...] | Sequence[tuple[Tensor, ...]]:
        """The tensors of a picture."""
        if isinstance(index, slice):
            return KeptSequence(self._items[index])
        return load_all(self._items[index])

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return (load_all(item) for item in self._items)


class _Memory:
    def __init__(self, device: torch.device, budget: int) -> None:
        self.device, self.budget, self.used = device, budget, 0

    def take(self, size: int) -> None:
        self.used += size


class _InMemory(Kept):
    def __init__(self, tensor: Tensor, memory: _Memory, device: torch.device) -> None:
        size = tensor.numel() * tensor.itemsize
        if tensor.untyped_storage().nbytes() > size:
            # A view would keep all that it is a view of, unseen by the budget.
            tensor = tensor.clone()
        tensor = tensor.to(memory.device)
        if device.type == "cuda" and memory.device.type == "cpu":
            tensor = tensor.pin_memory()
        self._tensor, self._device = tensor, device
        memory.take(size)
        weakref.finalize(self, memory.take, -size)

    def load(self) -> Tensor:
        return self._tensor.to(self._device, non_blocking=True)


class _OnDisk(Kept):
    def __init__(self, tensor: Tensor, folder: Path, device: torch.device) -> None:
        values = tensor.cpu().numpy()
        handle, name = tempfile.mkstemp(suffix=".bin", dir=folder)
        self._path, self._device = Path(name), device
        self._shape, self._dtype = values.shape, values.dtype
        weakref.finalize(self, self._path.unlink, missing_ok=True)
        try:
            with open(handle, "wb") as file:
                # numpy's own writing does not say that the disk is full.
                file.write(np.ascontiguousarray(values).data)
        except OSError as error:
            raise ResourceError(
                f"{folder}: {reason(error)}: no room for activations of {values.nbytes} bytes: "
                "make some, or raise the memory budget"
            ) from error

    def load(self) -> Tensor:
        values = torch.from_numpy(np.fromfile(self._path, self._dtype).reshape(self._shape))
        if self._device.type == "cuda":
            values = values.pin_memory()
        return values.to(self._device, non_blocking=True)
