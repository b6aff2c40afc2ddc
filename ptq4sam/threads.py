"""OpenMP's threads: told to sleep soon when they have nothing to do, and few for small models."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_log = logging.getLogger(__name__)

WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "300", "KMP_BLOCKTIME": "0"}
"""What OpenMP's libraries read when they are loaded: all of them, GNU's, that of LLVM and Intel.

GNU's counts how often a thread looks for work before it sleeps: 300 times take some microseconds,
about what it takes to wake it up.
"""
SETTINGS = {*WAITING, "KMP_LIBRARY"}
"""Variables that say how threads wait; a user who sets one of them has decided."""
COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables that say how many threads there are; a user who sets one of them has decided."""
ENOUGH_PRODUCTS = 2 * 10**9
"""Multiplications of a picture's forward for which another thread is worth it.

Operations of a smaller share take less time than to hand them out and to wait for the slowest.
"""
_PATCH_PIXELS = 16 * 16


def wait_asleep() -> bool:
    """Let idle threads of OpenMP sleep soon; `import ptq4sam` calls it.

    By default they spin for milliseconds, because to wake one up takes some microseconds. Where
    another program needs the core they take it from that program, and threads that have work to do
    wait for those that have none. Settings of the user's environment are left as they are.

    It has to be called before torch is loaded; later it serves only the processes that this one
    starts.

    Returns:
        Whether the environment was changed.
    """
    if not SETTINGS.isdisjoint(os.environ):
        return False
    if "torch" in sys.modules:
        _log.debug("torch was imported before ptq4sam: its threads spin while they wait")
    os.environ.update(WAITING)
    return True


@contextlib.contextmanager
def computing_with(threads: int) -> Iterator[None]:
    """Compute with so many threads of torch."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def suited_threads(model: object, side: int) -> Iterator[None]:
    """Compute with no more threads than a model has work for, by its weights and its pictures.

    The small ones are as quick with one thread as with two, and do not have to wait for a core that
    another program holds. The number follows from the model, not from a measurement, so that a run
    that is done again adds in the same order. A number that the environment sets stays, and so do
    the threads of a model that torch does not run.

    Args:
        model: a network, or what runs elsewhere.
        side: of its square pictures, in pixels.
    """
    import torch
    from torch import nn

    threads = torch.get_num_threads()
    if isinstance(model, nn.Module) and not any(name in os.environ for name in COUNTS):
        weights = sum(
            tensor.numel() for tensor in itertools.chain(model.parameters(), model.buffers())
        )
        products = weights * side**2 // _PATCH_PIXELS
        threads = max(1, min(threads, products // ENOUGH_PRODUCTS))
    with computing_with(threads):
        yield


def suited_to(sam: Any) -> AbstractContextManager[None]:
    """`suited_threads` of a SAM, of any kind, and its pictures."""
    return suited_threads(sam, sam.geometry.encoder_side)


def suited_to_model(function: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """Let a function compute as `suited_to` says; its first argument is a SAM.

    For all that calibrates, learns and evaluates: a number that comes of two ways of doing the same
    has the same bits.
    """

    @functools.wraps(function)
    def run(sam: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with suited_to(sam):
            return function(sam, *args, **kwargs)

    return run
