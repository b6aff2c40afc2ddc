"""Workers on a Ray cluster: one actor each, with a GPU of its own where the cluster has some."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ptq4sam.errors import ConfigError, DependencyError
from ptq4sam.sweep.processes import Make
from ptq4sam.sweep.tasks import Outcome, Task


class Cluster:
    """A pool of Ray actors; use it in a `with` block.

    The sweep's folder and the data must be on storage that every node sees under one path.

    Args:
        make: makes a worker; called in the actor.
        address: of the cluster, as ray.init takes it: "auto", "host:6379", "ray://host:10001".
        count: how many actors, which share the cluster's cores and GPUs; None for one a GPU, or one
            a core where there are none.

    Raises:
        DependencyError: ray is not installed.
        ConfigError: there is no cluster, or not enough of it.
    """

    def __init__(self, make: Make, address: str, count: int | None = None) -> None:
        try:
            import ray
        except ImportError as error:
            raise DependencyError("a Ray cluster needs ray: pip install 'ptq4sam[ray]'") from error
        self._ray = ray
        try:
            self._context = ray.init(address=address, ignore_reinit_error=True, log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise ConfigError(
                f"there is no Ray cluster at {address!r} ({' '.join(str(error).split())[:150]}): "
                "start one with ray start --head, and give its address or auto"
            ) from error
        resources = ray.cluster_resources()
        gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
        count = count or gpus or cpus
        if not 1 <= count <= max(gpus, cpus):
            ray.shutdown()
            raise ConfigError(
                f"asked for {count} workers, but the Ray cluster has {cpus} cores and {gpus} GPUs: "
                "ask for fewer"
            )
        # Ray gives each actor as many threads as cores, and shows it its own GPU alone.
        actor = ray.remote(num_cpus=max(1, cpus // count), num_gpus=min(1.0, gpus / count))(_Actor)
        neighbours = -(-count // len(ray.nodes()))
        self._start: Callable[[int], Any] = lambda number: actor.remote(make, number, neighbours)
        self._idle = {number: self._start(number) for number in range(count)}
        self._busy: dict[Any, tuple[int, Any, Task]] = {}

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in (*self._idle.values(), *(actor for _, actor, _ in self._busy.values())):
            self._ray.kill(actor)
        self._ray.shutdown()

    @property
    def free(self) -> int:
        """How many actors have nothing to do."""
        return len(self._idle)

    def give(self, task: Task) -> None:
        """Let a free actor begin a task."""
        number, actor = self._idle.popitem()
        self._busy[actor.do.remote(task)] = (number, actor, task)

    def wait(self, seconds: float) -> list[tuple[Task, Outcome]]:
        """What has ended, waiting for a while at most."""
        done, _ = self._ray.wait(list(self._busy), num_returns=1, timeout=seconds)
        ended = []
        for reference in done:
            number, actor, task = self._busy.pop(reference)
            try:
                outcome = self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                # The actor or its node died, as by the out-of-memory killer.
                what = " ".join(str(error).split())[:300]
                outcome = Outcome(f"its worker died: {what}", worker=f"actor {number}")
                actor = self._start(number)
            self._idle[number] = actor
            ended.append((task, outcome))
        return ended


class _Actor:
    """A worker within Ray."""

    def __init__(self, make: Make, number: int, neighbours: int) -> None:
        self._worker = make(number, neighbours)

    def do(self, task: Task) -> Outcome:
        """Do a task."""
        return self._worker.do(task)
