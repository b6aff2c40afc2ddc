"""Give tasks to workers as soon as what they need is there, and record the trials."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone

from ptq4sam.sweep.processes import Pool
from ptq4sam.sweep.store import Store, TrialRecord
from ptq4sam.sweep.tasks import Outcome, Task

_log = logging.getLogger(__name__)

_REFRESH = 0.5
"""Seconds between two looks at a sweep that waits."""


@dataclass
class State:
    """How far a sweep is, for whoever shows it.

    Attributes:
        waiting: tasks that were not begun, in their order.
        running: tasks that were, with the time of their beginning.
        records: of the trials that have ended, now or before, by key.
        shared: how many pieces of shared work were done, by kind.
        seconds: of the trials that were done now.
        failed: outcomes of shared work that failed, by its key, with its label in the error.
    """

    waiting: list[Task]
    records: dict[str, TrialRecord]
    running: dict[str, tuple[Task, float]] = field(default_factory=dict)
    shared: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    failed: dict[str, Outcome] = field(default_factory=dict)

    def time_left(self, workers: int) -> float | None:
        """Seconds that the rest will take, by the mean of the trials so far; None without any."""
        known = self.seconds or [r.seconds for r in self.records.values() if r.status == "done"]
        if not known:
            return None
        mean, now = sum(known) / len(known), time.monotonic()
        left = sum(task.kind == "trial" for task in self.waiting) * mean
        left += sum(
            max(0.0, mean - (now - begun))
            for task, begun in self.running.values()
            if task.kind == "trial"
        )
        return left / workers


def schedule(
    tasks: Iterable[Task],
    pool: Pool,
    store: Store,
    records: dict[str, TrialRecord],
    show: Callable[[State], None] = lambda _: None,
) -> State:
    """Do all tasks; a trial's record is in the store as soon as it has ended.

    A task whose needs failed fails with their error and log; shared work is done once.

    Args:
        tasks: each behind what it needs.
        pool: workers.
        store: receives the records.
        records: those of earlier trials, by key.
        show: called whenever something has changed, and now and then.

    Raises:
        StoreError: a record cannot be written.
    """
    state = State(list(tasks), dict(records))
    there: set[str] = set()
    while state.waiting or state.running:
        for task in _doomed(state.waiting, state.failed):
            state.waiting.remove(task)
            why = next(state.failed[key] for key in task.needs if key in state.failed)
            _end(state, store, task, why, 0.0)
        while pool.free and (ready := _next(state.waiting, there)) is not None:
            state.waiting.remove(ready)
            state.running[ready.key] = (ready, time.monotonic())
            pool.give(ready)
        show(state)
        for task, outcome in pool.wait(_REFRESH) if state.running else ():
            _, begun = state.running.pop(task.key)
            seconds = time.monotonic() - begun
            if outcome.error is None:
                there.add(task.key)
            _end(state, store, task, outcome, seconds)
    show(state)
    return state


def _next(waiting: list[Task], there: set[str]) -> Task | None:
    """The first task whose needs are there."""
    return next((task for task in waiting if there.issuperset(task.needs)), None)


def _doomed(waiting: list[Task], failed: dict[str, Outcome]) -> list[Task]:
    return [task for task in waiting if not failed.keys().isdisjoint(task.needs)]


def _end(state: State, store: Store, task: Task, outcome: Outcome, seconds: float) -> None:
    if task.kind != "trial":
        state.shared[task.kind] += 1
        _log.info("%s: %s", task.label, outcome.error or f"{seconds:.1f} s")
        if outcome.error is not None:
            why = f"{task.label}: {outcome.error}"
            state.failed[task.key] = Outcome(why, versions=outcome.versions, log=outcome.log)
        return
    now = datetime.now(timezone.utc).timestamp()
    record = TrialRecord(
        key=task.key,
        name=task.label,
        status="done" if outcome.error is None else "failed",
        seed=task.settings.seed,
        settings=task.settings.to_dict(),
        scheme=task.settings.scheme.to_yaml(),
        metrics=outcome.metrics or {},
        phases=outcome.phases or {},
        versions=outcome.versions or {},
        seconds=seconds,
        started=datetime.fromtimestamp(now - seconds, timezone.utc).isoformat(
            timespec="milliseconds"
        ),
        worker=outcome.worker,
        error=outcome.error or "",
        log=outcome.log,
    )
    store.append(record)
    state.records[task.key] = record
    if outcome.error is None:
        state.seconds.append(seconds)
    else:
        _log.warning("trial %s failed: %s", task.label, outcome.error)
