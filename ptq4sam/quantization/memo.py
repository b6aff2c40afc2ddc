"""What follows from tensors, kept until one of them changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Memo(Generic[T]):
    """A value that is made of tensors, once: to ask a GPU for a number is to wait for all it does.

    It is made anew where a tensor is another one, or was changed in place: torch counts that, but
    neither what is done to the `.data` of a tensor nor the steps of fused optimisers: who learns
    must clear it. A copy of a memo is empty.
    """

    def __init__(self) -> None:
        self._value: T | None = None
        self._key: tuple[Hashable, ...] | None = None
        self._sources: tuple[Tensor, ...] = ()

    def get(self, make: Callable[[], T], sources: Sequence[Tensor], *others: Hashable) -> T:
        """The value.

        Args:
            make: makes it.
            sources: all tensors that it depends on.
            others: what else it depends on.
        """
        if torch.is_inference_mode_enabled() or any(map(Tensor.is_inference, sources)):
            # Changes of such tensors are not counted.
            return make()
        key = (*map(_identity, sources), *others)
        if self._value is None or key != self._key:
            self._value, self._key = make(), key
            # Kept, so that no other tensor gets its place in memory.
            self._sources = tuple(source.detach() for source in sources)
        return self._value

    def clear(self) -> None:
        """Forget the value."""
        self._value, self._key, self._sources = None, None, ()

    def __deepcopy__(self, _copied: dict[int, Any]) -> Memo[T]:
        return Memo()

    def __reduce__(self) -> tuple[type[Memo[T]], tuple[()]]:
        return Memo, ()


def _identity(tensor: Tensor) -> Hashable:
    return tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.device, tensor._version
