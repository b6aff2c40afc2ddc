"""Recorded steps do what steps do; here with recordings that do what CUDA graphs do."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor

from ptq4sam.methods import graphs
from ptq4sam.methods.graphs import repeated
from tests.fake_graphs import FakeGraphs


class Counting:
    """A step that moves a state by what it is given, and draws."""

    def __init__(self) -> None:
        self.state = torch.zeros(3)
        self.generator = torch.Generator().manual_seed(0)
        self.calls = 0

    def __call__(self, kind: bool, tensors: Sequence[Tensor]) -> Tensor:
        self.calls += 1
        drawn = torch.rand(3, generator=self.generator)
        total = tensors[0] + drawn
        for tensor in tensors[1:]:
            total = total + tensor.sum()
        self.state += -total if kind else total
        return self.state.sum()


def numbers(count: int, size: int = 3) -> list[Tensor]:
    return list(torch.randn(count, size, generator=torch.Generator().manual_seed(1)).unbind())


def test_a_replayed_step_does_what_a_step_does() -> None:
    plain, recorded = Counting(), Counting()
    recorder = FakeGraphs(recorded.generator)
    found, expected = [], []
    with repeated(recorded, recorder) as run:
        for index, x in enumerate(numbers(12)):
            kind = index % 3 == 0
            found.append(run(kind, [x]))
            expected.append(plain(kind, [x]))
    # Each kind runs twice, and once to be recorded.
    assert (recorded.calls, recorder.recorded, recorder.replayed) == (6, 2, 12 - 4)
    assert torch.equal(torch.stack(found), torch.stack(expected))
    assert torch.equal(recorded.state, plain.state)
    assert torch.equal(recorded.generator.get_state(), plain.generator.get_state())


def test_other_shapes_and_what_is_one_have_recordings_of_their_own() -> None:
    plain, recorded = Counting(), Counting()
    recorder = FakeGraphs(recorded.generator)
    with repeated(recorded, recorder) as run:
        for x, y in zip(numbers(5), numbers(5, size=4), strict=True):
            for tensors in ([x], [x, x], [x, y]):
                assert torch.equal(run(False, tensors), plain(False, tensors))
    assert recorder.recorded == 3


def test_so_many_recordings_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_MOST", 2)
    plain, recorded = Counting(), Counting()
    recorder = FakeGraphs(recorded.generator)
    with repeated(recorded, recorder) as run:
        for _ in range(4):
            for size in (1, 2, 3, 4):
                tensors = [torch.ones(3), torch.ones(size)]
                assert torch.equal(run(False, tensors), plain(False, tensors))
    assert recorder.recorded == 2


class Asking(Counting):
    """Reads a number."""

    def __call__(self, kind: bool, tensors: Sequence[Tensor]) -> Tensor:
        assert self.state.sum() < 1e9
        return super().__call__(kind, tensors)


class Telling(Counting):
    """Makes a tensor of a number of the host."""

    def __call__(self, kind: bool, tensors: Sequence[Tensor]) -> Tensor:
        return super().__call__(kind, [tensors[0] * self.state.new_tensor([1.0])])


@pytest.mark.parametrize("kind_of_step", [Asking, Telling])
def test_what_cannot_be_recorded_runs_as_it_is(
    kind_of_step: type[Counting], caplog: pytest.LogCaptureFixture
) -> None:
    graphs._tell.cache_clear()
    plain, recorded = Counting(), kind_of_step()
    recorder = FakeGraphs(recorded.generator)
    with caplog.at_level(logging.WARNING), repeated(recorded, recorder) as run:
        for x in numbers(6):
            assert torch.equal(run(False, [x]), plain(False, [x]))
    assert recorder.recorded == 0
    (message,) = caplog.messages
    assert "not permitted when stream is capturing" in message
    assert "recon.cuda_graphs=false" in message


def test_nothing_is_recorded_on_a_cpu() -> None:
    assert graphs.recorder(torch.Generator("cpu")) is None
    step = Counting()
    with repeated(step, None) as run:
        assert run is step


class FakeCuda:
    """The names of torch.cuda that recording needs; writes down what is asked of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        for name in ("Stream", "CUDAGraph", "graph", "stream", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")

    def Stream(self, _device: object) -> SimpleNamespace:
        return SimpleNamespace(wait_stream=lambda _other: self.asked.append("own waits"))

    def current_stream(self, _device: object) -> SimpleNamespace:
        return SimpleNamespace(wait_stream=lambda _other: self.asked.append("outside waits"))

    def CUDAGraph(self) -> SimpleNamespace:
        return SimpleNamespace(
            register_generator_state=lambda _generator: self.asked.append("own numbers"),
            replay=lambda: self.asked.append("replay"),
        )

    @contextlib.contextmanager
    def stream(self, _stream: object) -> Iterator[None]:
        self.asked.append("own stream")
        yield

    @contextlib.contextmanager
    def graph(self, _graph: object, pool: str, stream: object) -> Iterator[None]:
        self.asked.append(f"record in {pool}")
        yield
        self.asked.append("recorded")


def test_cuda_is_asked_in_the_order_that_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    generator = SimpleNamespace(device=torch.device("cuda", 0))
    monkeypatch.setattr(graphs, "_OWN_GENERATORS", "__call__")
    recorder = graphs.recorder(cast(torch.Generator, generator))
    assert recorder is not None

    def step(kind: bool, tensors: Sequence[Tensor]) -> Tensor:
        cuda.asked.append("step")
        return tensors[0]

    with repeated(step, recorder) as run:
        for x in numbers(4):
            run(False, [x])
    inside = ["step", "step", "own numbers", "record in pool", "step", "recorded"]
    around = ["own waits", "own stream", *inside, "replay", "replay", "outside waits"]
    assert cuda.asked == around
