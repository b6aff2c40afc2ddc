"""Workers on this machine: one long-lived process each."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol

from ptq4sam.sweep.tasks import Outcome, Task

if sys.platform == "win32":
    from multiprocessing.connection import PipeConnection as Connection
else:
    from multiprocessing.connection import Connection

_SPAWN = multiprocessing.get_context("spawn")
_FAREWELL = 3.0
"""Seconds that a worker has to end when it was told to."""


class Doer(Protocol):
    """Does tasks."""

    def do(self, task: Task) -> Outcome:
        """Do one; failures are in the outcome."""


class Pool(Protocol):
    """Workers somewhere. A task is given to a free worker; its outcome comes back by `wait`."""

    @property
    def free(self) -> int:
        """How many workers have nothing to do."""

    def give(self, task: Task) -> None:
        """Let a free worker begin a task."""

    def wait(self, seconds: float) -> list[tuple[Task, Outcome]]:
        """What has ended, waiting for a while at most."""


Make = Callable[[int, int], Doer]
"""Makes a worker from its number and from how many share its machine."""


@dataclass
class _Place:
    number: int
    process: BaseProcess
    connection: Connection
    task: Task | None = None


class Processes:
    """A pool of processes; use it in a `with` block.

    A process that dies, as the system's out-of-memory killer ends one, costs the task that it was
    at, and is replaced.

    Args:
        make: makes a worker; called in the process, so that it must be picklable.
        count: how many.
        logs: folder that receives what the processes write to standard output and error.
        environment: variables of each process, by its number.
    """

    def __init__(
        self,
        make: Make,
        count: int,
        logs: Path,
        environment: Callable[[int], dict[str, str]] = lambda _: {},
    ) -> None:
        self._make, self._count, self._logs = make, count, logs
        self._environment = environment
        logs.mkdir(parents=True, exist_ok=True)
        self._places = [self._start(number) for number in range(count)]

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        # What they have finished is in files that are complete or not there.
        for place in self._places:
            place.process.terminate()
        for place in self._places:
            place.process.join(_FAREWELL)
            if place.process.is_alive():
                place.process.kill()
                place.process.join()
            place.connection.close()

    @property
    def free(self) -> int:
        """How many workers have nothing to do."""
        return sum(place.task is None for place in self._places)

    def give(self, task: Task) -> None:
        """Let a free worker begin a task."""
        place = next(place for place in self._places if place.task is None)
        if not place.process.is_alive():
            place = self._replace(place)
        place.task = task
        place.connection.send(task)

    def wait(self, seconds: float) -> list[tuple[Task, Outcome]]:
        """What has ended, waiting for a while at most."""
        busy = {place.connection: place for place in self._places if place.task is not None}
        ended = []
        # The end of a process ends its side of the connection, which is seen here too.
        for connection in wait(list(busy), seconds):
            place = busy[connection]  # type: ignore[index]
            task, place.task = place.task, None
            assert task is not None
            try:
                outcome = place.connection.recv()
            except (EOFError, OSError):
                place.process.join(_FAREWELL)
                outcome = Outcome(_death(place.process), worker=f"process {place.number}")
                self._replace(place)
            ended.append((task, outcome))
        return ended

    def _start(self, number: int) -> _Place:
        ours, theirs = _SPAWN.Pipe()
        process = _SPAWN.Process(
            target=_serve,
            args=(self._make, number, self._count, theirs, self._logs / f"worker{number}.log"),
            name=f"sweep worker {number}",
        )
        with _environment(self._environment(number)):
            process.start()
        # Else its end would not be seen: the pipe would still have a writer.
        theirs.close()
        return _Place(number, process, ours)

    def _replace(self, place: _Place) -> _Place:
        place.connection.close()
        fresh = self._start(place.number)
        self._places[place.number] = fresh
        return fresh


def _serve(make: Make, number: int, count: int, connection: Connection, log: Path) -> None:
    """What a process does: tasks, until there can be none any more."""
    # The parent decides what an interruption means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with_parent()
    with log.open("a", encoding="utf-8", errors="backslashreplace", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        # Python's own streams of a Windows console do not follow their descriptors.
        sys.stdout = sys.stderr = file
        try:
            worker = make(number, count)
            with contextlib.suppress(EOFError, BrokenPipeError):
                while True:
                    connection.send(worker.do(connection.recv()))
        except Exception:
            # While the log is open: whoever is told of the end looks there for the reason.
            traceback.print_exc()
            sys.exit(1)


def _end_with_parent() -> None:
    """A killed sweep leaves no process behind that computes for nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _death(process: BaseProcess) -> str:
    code = process.exitcode
    if sys.platform != "win32" and code == -signal.SIGKILL:
        return (
            "its worker was killed (signal 9), as the system does when memory is used up: use "
            "fewer workers, or calibrate on fewer pictures"
        )
    how = f"by signal {-code}" if code is not None and code < 0 else f"with status {code}"
    return f"its worker ended {how}: its log is in workers/ of the sweep's folder"


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Environment variables for processes started within the `with` block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
