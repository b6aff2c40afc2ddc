"""Activations live within the budget, then on disk, and come back as they were."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from ptq4sam.errors import ResourceError
from ptq4sam.model.cache import ActivationCache, KeptSequence, load_all
from tests.full_disks import FullDisk, full_disk

__all__ = ["full_disk"]

CPU = torch.device("cpu")
KILO = 256  # floats in a KiB


def test_tensors_beyond_the_budget_go_to_disk_and_back(tmp_path: Path) -> None:
    cache = ActivationCache(CPU, budget=3 * 1024, folder=tmp_path)
    tensors = [torch.full((KILO,), float(index)) for index in range(5)]
    kept = [cache.keep([tensor]) for tensor in tensors]
    assert cache.memory_bytes == 3 * 1024
    on_disk = [path.stat().st_size for path in tmp_path.glob("activations.*/*")]
    assert len(on_disk) == 2
    assert 2 * 1024 <= sum(on_disk) < 3 * 1024
    for index, (tensor,) in enumerate(KeptSequence(kept)):
        assert torch.equal(tensor, tensors[index])
    del kept[0]
    gc.collect()
    assert cache.memory_bytes == 2 * 1024
    cache.keep([tensors[0]])
    del kept, cache
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_goes(tmp_path: Path) -> None:
    left = tmp_path / "activations.killed"
    left.mkdir()
    (left / "old.npy").write_bytes(b"old")
    (tmp_path / "metrics.json").write_text("{}")
    cache = ActivationCache(CPU, budget=0, folder=tmp_path)
    kept = cache.keep([torch.zeros(KILO)])
    assert not left.exists()
    assert (tmp_path / "metrics.json").exists()
    assert load_all(kept)[0].shape == (KILO,)


def test_a_tensor_given_twice_is_kept_once() -> None:
    cache = ActivationCache(CPU, budget=2**20)
    first, second = torch.zeros(KILO), torch.ones(KILO)
    state = cache.keep([first, second, first])
    loaded = load_all(state)
    assert loaded[0] is loaded[2]
    assert cache.memory_bytes == 2 * 1024
    changed = torch.full((KILO,), 2.0)
    after = cache.keep([loaded[0], changed], list(zip(loaded, state, strict=True)))
    assert cache.memory_bytes == 3 * 1024
    assert after[0] is state[0]


def test_a_view_does_not_hold_what_it_is_a_view_of() -> None:
    cache = ActivationCache(CPU, budget=2**20)
    whole = torch.randn(100, KILO)
    (kept,) = cache.keep([whole[3]])
    assert cache.memory_bytes == 1024
    assert kept.load().untyped_storage().nbytes() == 1024


def test_a_full_disk_names_the_knob(tmp_path: Path, full_disk: FullDisk) -> None:
    with full_disk() as reason:
        cache = ActivationCache(CPU, budget=0, folder=tmp_path / "d")
        told = rf"^{tmp_path}/d/activations\..*: {reason}: .*raise the memory budget"
        with pytest.raises(ResourceError, match=told):
            cache.keep([torch.zeros(100 * KILO)])
