"""Steps that a GPU repeats by itself: recorded once, then replayed (CUDA graphs).

A step of learning is some hundred small operations, which a host tells to a GPU one by one, about
as fast as the GPU does them. A recording of them is told at once. It does the same to the same
memory each time: what a step reads and writes has to stay where it is, and what changes from step
to step has to be in tensors.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

_log = logging.getLogger(__name__)

Step: TypeAlias = Callable[[bool, Sequence[Tensor]], Tensor]
"""What is repeated: of which of two kinds, with which tensors; gives one tensor."""

_AS_IT_IS = 2
"""Times that a step runs as it is before it is recorded: these compile and load its kernels, and
make the tensors that stay."""
_MOST = 8
"""Recordings of one step: of either kind, with tensors of so many shapes."""


class Recorder(Protocol):
    """What can record work of a device."""

    def working(self) -> contextlib.AbstractContextManager[None]:
        """All that may be recorded is done within this `with` block."""
        ...

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """Record what `work` does with a device, which does none of it yet.

        Random numbers are drawn anew each time, in the order in which `work` itself would draw.

        Returns:
            What `work` gives, in memory that each call of the second filled anew.

        Raises:
            RuntimeError: something in it cannot be recorded, or memory is used up.
        """
        ...


def recorder(generator: torch.Generator) -> Recorder | None:
    """What records the work of a device that a generator draws for; None where nothing can."""
    if generator.device.type == "cuda" and hasattr(torch.cuda.CUDAGraph, _OWN_GENERATORS):
        return _CudaGraphs(generator)
    return None


_OWN_GENERATORS = "register_generator_state"


class _CudaGraphs:
    """Records on a stream of its own, on which the work that is not recorded runs too.

    What autograd keeps of a parameter belongs to the stream on which it was made.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._stream = torch.cuda.Stream(generator.device)  # type: ignore[no-untyped-call]
        # One for all: no two recordings run at once, and what one leaves is read before the next.
        self._memory = torch.cuda.graph_pool_handle()

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        outside = torch.cuda.current_stream(self._generator.device)
        self._stream.wait_stream(outside)
        with torch.cuda.stream(self._stream), warnings.catch_warnings():
            # The first steps are not recorded, which Adam takes for a mistake.
            warnings.filterwarnings("ignore", message=".*capturable=True")
            yield
        outside.wait_stream(self._stream)

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        with torch.cuda.graph(graph, pool=self._memory, stream=self._stream):
            result = work()
        return result, graph.replay


@contextlib.contextmanager
def repeated(step: Step, recorder: Recorder | None) -> Iterator[Step]:
    """The step, which within the `with` block is recorded and replayed where that can be.

    Args:
        step: works on its device alone, and never waits for it.
        recorder: what records it; None where nothing is recorded.
    """
    if recorder is None:
        yield step
        return
    with recorder.working():
        yield _Repeated(step, recorder)


class _Repeated:
    def __init__(self, step: Step, recorder: Recorder) -> None:
        self._step, self._recorder = step, recorder
        self._seen: Counter[Hashable] = Counter()
        self._inputs: dict[Hashable, tuple[Tensor, ...]] = {}
        self._recordings: dict[Hashable, tuple[Tensor, Callable[[], None]]] = {}
        self._recording = True

    def __call__(self, kind: bool, tensors: Sequence[Tensor]) -> Tensor:
        form = _form(tensors)
        key = kind, form
        self._seen[key] += 1
        if key not in self._recordings and not self._record(kind, tensors, form):
            return self._step(kind, tensors)
        # What is one is copied once.
        pairs = zip(self._inputs[form], tensors, strict=True)
        for inside, given in {id(inside): (inside, given) for inside, given in pairs}.values():
            inside.copy_(given, non_blocking=True)
        result, replay = self._recordings[key]
        replay()
        # The next replay writes over it.
        return result.clone()

    def _record(self, kind: bool, tensors: Sequence[Tensor], form: Hashable) -> bool:
        """Record the step where it is time to; whether it was."""
        key = kind, form
        full = len(self._recordings) == _MOST
        if not self._recording or full or self._seen[key] <= _AS_IT_IS:
            return False
        try:
            if form not in self._inputs:
                self._inputs[form] = _copies(tensors)
            work = functools.partial(self._step, kind, self._inputs[form])
            self._recordings[key] = self._recorder.record(work)
        except RuntimeError as error:
            self._recording = False
            _tell(str(error).strip().splitlines()[0][:200])
        return self._recording


@functools.cache
def _tell(why: str) -> None:
    _log.warning(
        "a step could not be recorded (%s): it runs as it is, which may take twice as long; "
        "recon.cuda_graphs=false silences this",
        why,
    )


def _form(tensors: Sequence[Tensor]) -> Hashable:
    """Of tensors what a recording holds for: shapes, types, and which of them are the same."""
    places = [id(tensor) for tensor in tensors]
    return tuple(
        (tensor.shape, tensor.dtype, places.index(place))
        for tensor, place in zip(tensors, places, strict=True)
    )


def _copies(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The same tensors elsewhere; what is one is one there too."""
    copies = {id(tensor): tensor.clone() for tensor in tensors}
    return tuple(copies[id(tensor)] for tensor in tensors)
