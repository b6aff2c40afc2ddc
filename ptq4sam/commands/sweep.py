"""`ptq4sam sweep`: from its arguments to tables."""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ptq4sam.errors import ConfigError
from ptq4sam.records import split_assignment

if TYPE_CHECKING:
    from ptq4sam.experiments.sweep.grid import Sweep
    from ptq4sam.experiments.sweep.processes import Pool
    from ptq4sam.experiments.sweep.store import Store, TrialRecord
    from ptq4sam.experiments.sweep.tasks import Folder
    from ptq4sam.experiments.sweep.worker import Worker

_log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ptq4sam sweep`."""
    parser.add_argument("file", type=Path, help="grid of trials, e.g. exp/sweeps/bits.yaml")
    parser.add_argument(
        "--work-dir", type=Path, help="default: work_dirs/sweeps/<name of the file>"
    )
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="workers; default: 1, on Ray all there are"
    )
    parser.add_argument(
        "--ray", metavar="ADDRESS", help="work on this Ray cluster: auto, host:port"
    )
    parser.add_argument("--images", type=Path, help="evaluate these pictures, not generated scenes")
    parser.add_argument("--annotations", type=Path, metavar="A.json", help="COCO instances file")
    parser.add_argument("--calibration-images", type=Path)
    parser.add_argument("--calibration-annotations", type=Path, metavar="B.json")
    parser.add_argument("--prompts", help="prompt source, as of evaluate")
    parser.add_argument("--limit", type=int, metavar="N", help="evaluate the first N pictures only")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="settings of every trial that the grid does not set, e.g. steps=50",
    )
    parser.add_argument("--retry-failed", action="store_true", help="try failed trials again")
    parser.add_argument("--dry-run", action="store_true", help="list the trials and stop")


def run(parsed: argparse.Namespace) -> int:
    """Do what is left of a sweep and show all of it; 1 where trials have failed."""
    from ptq4sam.experiments.sweep.grid import read_sweep
    from ptq4sam.experiments.sweep.settings import require_pictures
    from ptq4sam.experiments.sweep.store import Store
    from ptq4sam.experiments.sweep.tasks import Folder

    if parsed.jobs is not None and parsed.jobs < 1:
        raise ConfigError(f"asked for --jobs {parsed.jobs}: use 1 or more")
    sweep = read_sweep(parsed.file, overrides(parsed))
    if parsed.dry_run:
        sys.stdout.write("".join(f"{trial.name}\n" for trial in sweep.trials))
        return 0
    for trial in sweep.trials:
        require_pictures(trial.settings)
    folder = Folder(parsed.work_dir or Path("work_dirs") / "sweeps" / sweep.name)
    with Store(folder.store) as store:
        return _go_on(parsed, sweep, folder, store)


def overrides(parsed: argparse.Namespace) -> dict[str, Any]:
    """What the command line sets for every trial.

    Raises:
        ConfigError: pictures and annotations do not belong together, or a value is not YAML.
    """
    found: dict[str, Any] = {}
    for assignment in parsed.set:
        key, text = split_assignment(assignment)
        try:
            found[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"--set {assignment!r}: the value is not YAML") from None
    for name, prefix in (("data", ""), ("calibration", "calibration_")):
        images = getattr(parsed, f"{prefix}images")
        annotations = getattr(parsed, f"{prefix}annotations")
        if (images is None) != (annotations is None):
            flag = f"--{prefix.replace('_', '-')}"
            raise ConfigError(f"{flag}images and {flag}annotations go together: give both")
        if images is not None:
            found[name] = {"images": str(images), "annotations": str(annotations)}
    for name in ("prompts", "limit"):
        if getattr(parsed, name) is not None:
            found[name] = getattr(parsed, name)
    return found


def _go_on(parsed: argparse.Namespace, sweep: Sweep, folder: Folder, store: Store) -> int:
    from rich.console import Console

    from ptq4sam.experiments.sweep.live import showing, tell
    from ptq4sam.experiments.sweep.scheduler import schedule
    from ptq4sam.experiments.sweep.summary import rows, write
    from ptq4sam.experiments.sweep.tasks import plan

    records: dict[str, TrialRecord] = store.latest()
    ended = {"done"} if parsed.retry_failed else {"done", "failed"}
    left = [
        trial
        for trial in sweep.trials
        if trial.key not in records or records[trial.key].status not in ended
    ]
    before = len(sweep.trials) - len(left)
    _log.info("sweep %s: %d trials, %d of them ended before", sweep.name, len(sweep.trials), before)
    if left:
        _write_scenes(sweep, folder)
        tasks = plan(left, folder)
        with (
            _pool(parsed, folder, len(tasks)) as (pool, workers),
            showing(sweep, workers, Console(stderr=True)) as show,
        ):
            state = schedule(tasks, pool, store, records, show)
        records = state.records
        done = ", ".join(f"{count} x {kind}" for kind, count in state.shared.items())
        _log.info("shared between trials: %s", done or "nothing that was not there already")
    found = rows(sweep, records)
    tell(sweep, found, Console(soft_wrap=not sys.stdout.isatty()))
    for path in write(sweep, found, folder.path):
        sys.stdout.write(f"written to {path}\n")
    return 0 if all(row.status == "done" for row in found) else 1


@contextlib.contextmanager
def _pool(parsed: argparse.Namespace, folder: Folder, tasks: int) -> Iterator[tuple[Pool, int]]:
    """Workers, and how many."""
    from ptq4sam.experiments.sweep.cluster import Cluster
    from ptq4sam.experiments.sweep.processes import Processes
    from ptq4sam.experiments.sweep.tasks import Folder

    if parsed.ray is not None:
        make = functools.partial(make_worker, Folder(folder.path.resolve()), None)
        with Cluster(make, parsed.ray, parsed.jobs) as cluster:
            yield cluster, cluster.free
        return
    jobs = min(parsed.jobs or 1, tasks)
    threads = max(1, _cores() // jobs)
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
    from ptq4sam.experiments.sweep.worker import Worker

    keep_freed_memory()
    return Worker(folder, neighbours, f"worker {number}", threads)


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


def _write_scenes(sweep: Sweep, folder: Folder) -> None:
    """Generate the scenes that trials without data sets need; those that are there stay."""
    from ptq4sam.data.scenes import write_scenes
    from ptq4sam.files import read_json

    settings = [trial.settings for trial in sweep.trials if trial.settings.data is None]
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
