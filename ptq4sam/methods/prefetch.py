"""Load what is needed next while a GPU computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def prefetched(
    load: Callable[[T], Sequence[Tensor]], wanted: Iterable[T], device: torch.device
) -> Iterator[Sequence[Tensor]]:
    """What `load` gives for each of `wanted`, in order.

    On CUDA the next item is loaded on a stream of its own while the caller computes with this one,
    so that copies out of pinned host memory cost no time. Elsewhere each is loaded when it is asked
    for.

    Args:
        load: gives tensors on the device.
        wanted: what to load.
        device: where the caller computes.
    """
    if device.type != "cuda":
        yield from map(load, wanted)
        return
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    computing = torch.cuda.current_stream(device)

    def begin(item: T) -> Sequence[Tensor]:
        # What lies on the device already may still be in the making.
        side.wait_stream(computing)
        with torch.cuda.stream(side):
            return load(item)

    following = iter(wanted)
    ahead = next(following, None)
    loaded = None if ahead is None else begin(ahead)
    while loaded is not None:
        computing.wait_stream(side)
        for tensor in loaded:
            tensor.record_stream(computing)
        ready = loaded
        ahead = next(following, None)
        loaded = None if ahead is None else begin(ahead)
        yield ready
