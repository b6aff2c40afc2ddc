"""What is free, and what a step needs, without a GPU."""

from __future__ import annotations

import pytest
import torch

from ptq4sam.deploy.cost import meta_sam
from ptq4sam.model import cache
from ptq4sam.model.cache import ActivationCache
from ptq4sam.model.memory import free_memory, working_bytes

GPU = torch.device("cuda", 0)


def test_what_the_allocator_holds_back_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (10 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: 50 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _device: 8 * 2**30)
    assert free_memory(GPU) == 52 * 2**30


def test_a_cache_leaves_a_gpu_what_the_model_at_work_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "free_memory", lambda _device: 16 * 2**30)
    assert ActivationCache(GPU).budget == 8 * 2**30
    assert ActivationCache(GPU, reserve=4 * 2**30).budget == 8 * 2**30
    assert ActivationCache(GPU, reserve=11 * 2**30).budget == 5 * 2**30
    assert ActivationCache(GPU, reserve=20 * 2**30).budget == 0
    assert ActivationCache(GPU, budget=123, reserve=20 * 2**30).budget == 123
    assert ActivationCache(torch.device("cpu"), reserve=20 * 2**30).budget == 8 * 2**30


@pytest.mark.parametrize(("name", "heads", "parameters"), [("vit_b", 12, 93.7), ("vit_h", 16, 641)])
def test_a_step_needs_a_copy_of_the_weights_and_some_global_attentions(
    name: str, heads: int, parameters: float
) -> None:
    matrix = heads * 4096**2 * 4
    assert working_bytes(meta_sam(name)) == pytest.approx(3.5 * matrix + 4e6 * parameters, rel=0.01)
