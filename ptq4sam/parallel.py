"""Several processes that share the work of one run, started by torchrun.

    torchrun --nproc-per-node 2 -m ptq4sam evaluate ...

Every process runs the same program. Work over pictures is shared out; what each process found is
gathered in the order of the pictures, so that results do not depend on the number of processes.
Without torchrun all this is the one process that there is.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from ptq4sam.errors import ConfigError

T = TypeVar("T")

# The other processes wait while the first one reconstructs, which may take days.
_PATIENCE = datetime.timedelta(days=30)


def started_by_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """This process belongs to torchrun's group within the `with` block, if it started it."""
    if not started_by_torchrun() or dist.is_initialized():
        yield
        return
    # Only small things travel, and gloo carries them on every machine.
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def count() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the process that writes and tells."""
    return rank() == 0


def local_device(device: torch.device) -> torch.device:
    """This process's own device of a kind: with several GPUs each process has one.

    Raises:
        ConfigError: one GPU was named for several processes, or there are fewer GPUs than those.
    """
    if count() == 1 or device.type != "cuda":
        return device
    place, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if device.index is not None or place >= found:
        raise ConfigError(
            f"{count()} processes were started for {device}, of {found} GPUs: start one for each "
            "GPU and name none"
        )
    return torch.device("cuda", place)


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's part: every `count()`-th item, from the one of its own number."""
    return items[rank() :: count()]


def gather(mine: Sequence[T]) -> list[T]:
    """What all processes found for their shares, in the order of the whole, for every process."""
    if count() == 1:
        return list(mine)
    parts: list[list[T]] = [[] for _ in range(count())]
    dist.all_gather_object(parts, list(mine))
    total = sum(map(len, parts))
    return [parts[index % count()][index // count()] for index in range(total)]


def average(tensors: Sequence[torch.Tensor]) -> None:
    """Give every process the mean of these tensors of all processes, in place.

    Args:
        tensors: of one type and device, as many and of the same shapes in each process.
    """
    if count() == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors]) / count()
    dist.all_reduce(flat)
    means = torch.split(flat, [tensor.numel() for tensor in tensors])
    for tensor, mean in zip(tensors, means, strict=True):
        tensor.copy_(mean.view_as(tensor))


def from_first(action: Callable[[], T]) -> T:
    """What the first process gets by an action, which the others do not do."""
    if count() == 1:
        return action()
    box: list[Any] = [action() if is_first() else None]
    dist.broadcast_object_list(box)
    result: T = box[0]
    return result


def copy_state_of_first(module: nn.Module) -> None:
    """Give every process the parameters and buffers that the first one has.

    Sizes may differ, as a quantizer's do that has learned in the first process only.
    """
    if count() == 1:
        return
    state = module.state_dict()
    shapes = from_first(lambda: [(name, v.shape, v.dtype) for name, v in state.items()])
    received = {}
    for name, shape, dtype in shapes:
        if is_first():
            tensor = state[name].cpu().contiguous()
        else:
            tensor = torch.empty(shape, dtype=dtype, device="cpu")
        dist.broadcast(tensor, src=0)
        received[name] = tensor
    if not is_first():
        module.load_state_dict(received)
