"""Batches come in order, loaded when they are asked for on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptq4sam.methods.prefetch import prefetched


def test_on_a_cpu_nothing_is_loaded_ahead() -> None:
    loaded: list[int] = []

    def load(number: int) -> tuple[Tensor]:
        loaded.append(number)
        return (torch.full((2,), float(number)),)

    batches = prefetched(load, [3, 1, 2], torch.device("cpu"))
    assert loaded == []
    assert next(batches)[0].tolist() == [3.0, 3.0]
    assert loaded == [3]
    assert [float(batch[0][0]) for batch in batches] == [1.0, 2.0]


@pytest.mark.gpu
def test_on_a_gpu_one_item_is_loaded_ahead_and_arrives_whole() -> None:
    device = torch.device("cuda")
    host = [torch.full((2**22,), float(number)).pin_memory() for number in range(8)]
    loaded: list[int] = []

    def load(number: int) -> tuple[Tensor]:
        loaded.append(number)
        return (host[number].to(device, non_blocking=True),)

    batches = prefetched(load, range(8), device)
    for number, (batch,) in enumerate(batches):
        assert len(loaded) == min(8, number + 2)
        assert (batch == number).all()
