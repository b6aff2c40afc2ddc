"""Do what is left of a sweep: workers, scenes, schedule."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ptq4sam.machine import cores
from ptq4sam.sweep.ended import told_of_others
from ptq4sam.sweep.grid import Sweep
from ptq4sam.sweep.processes import Pool, Processes
from ptq4sam.sweep.scheduler import State, schedule
from ptq4sam.sweep.settings import TrialSettings
from ptq4sam.sweep.store import Store
from ptq4sam.sweep.tasks import Folder, Task, plan

if TYPE_CHECKING:
    from ptq4sam.sweep.worker import Worker

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Crew:
    """Who does the trials.

    Attributes:
        jobs: how many workers; None for one, or on Ray for all there are.
        ray: address of the Ray cluster that they work on; None for processes of this machine.
    """

    jobs: int | None = None
    ray: str | None = None


def finish(
    sweep: Sweep,
    folder: Folder,
    store: Store,
    crew: Crew,
    retry_failed: bool = False,
    floats: Sequence[TrialSettings] = (),
) -> State:
    """Do the trials of a sweep that have not ended before.

    Args:
        sweep: its trials.
        folder: receives what they share.
        store: has the records of those that have ended, and receives the others.
        crew: who does them.
        retry_failed: do those that have failed again.
        floats: settings whose float model is scored, whether a trial needs it or not.
    """
    from rich.console import Console

    from ptq4sam.sweep.live import showing

    records = store.latest()
    ended = {"done"} if retry_failed else {"done", "failed"}
    left = [
        trial
        for trial in sweep.trials
        if trial.key not in records or records[trial.key].status not in ended
    ]
    before = len(sweep.trials) - len(left)
    _log.info("sweep %s: %d trials, %d of them ended before", sweep.name, len(sweep.trials), before)
    if told := told_of_others(sweep.trials, records):
        _log.warning("%s", told)
    tasks = plan(left, folder, floats)
    if not tasks:
        return State([], records)
    _write_scenes([task.settings for task in tasks], folder)
    with (
        _pool(crew, folder, tasks) as (pool, workers),
        showing(sweep, workers, Console(stderr=True)) as show,
    ):
        state = schedule(tasks, pool, store, records, show)
    done = ", ".join(f"{count} x {kind}" for kind, count in state.shared.items())
    _log.info("shared between trials: %s", done or "nothing that was not there already")
    return state


@contextlib.contextmanager
def _pool(crew: Crew, folder: Folder, tasks: Sequence[Task]) -> Iterator[tuple[Pool, int]]:
    """Workers, and how many."""
    from ptq4sam.sweep.cluster import Cluster

    if crew.ray is not None:
        make = functools.partial(make_worker, Folder(folder.path.resolve()), None)
        with Cluster(make, crew.ray, crew.jobs) as cluster:
            yield cluster, cluster.free
        return
    jobs = min(crew.jobs or 1, len(tasks))
    threads = max(1, cores() // jobs)
    make = functools.partial(make_worker, folder, threads)
    environment = functools.partial(_environment, threads)
    with Processes(make, jobs, folder.path / "workers", environment) as processes:
        yield processes, jobs


def make_worker(folder: Folder, threads: int | None, number: int, neighbours: int) -> Worker:
    """A worker in its process.

    Args:
        folder: the sweep's.
        threads: of torch; None for what the environment says.
        number: the worker's.
        neighbours: workers on this machine, itself included.
    """
    from ptq4sam.allocator import keep_freed_memory
    from ptq4sam.sweep.worker import Worker

    keep_freed_memory()
    return Worker(folder, neighbours, f"worker {number}", threads)


def _environment(threads: int, number: int) -> dict[str, str]:
    """Of a worker's process: its share of the cores, and a GPU of its own where there are some."""
    import torch

    variables = {"OMP_NUM_THREADS": str(threads)}
    gpus = torch.cuda.device_count()
    if gpus > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        names = visible if len(visible) == gpus else list(map(str, range(gpus)))
        variables["CUDA_VISIBLE_DEVICES"] = names[number % gpus]
    return variables


def _write_scenes(every: Iterable[TrialSettings], folder: Folder) -> None:
    """Generate the scenes that trials without data sets need; those that are there stay."""
    from ptq4sam.data.scenes import write_scenes
    from ptq4sam.files import read_json

    settings = [one for one in every if one.data is None]
    counts = {
        "train": max((one.scheme.calibrate for one in settings), default=0),
        "val": max((one.evaluated or 0 for one in settings), default=0),
    }
    for seed, (split, count) in enumerate(counts.items()):
        annotations = folder.scenes / "annotations" / f"{split}.json"
        there = len(read_json(annotations, "scenes")[0]["images"]) if annotations.exists() else 0
        if there < count:
            _log.info("writing %d generated scenes to %s", count, folder.scenes)
            write_scenes(folder.scenes, count, seed, split)
