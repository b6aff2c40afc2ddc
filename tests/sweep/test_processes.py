from __future__ import annotations

import os
import time
from pathlib import Path

from ptq4sam.sweep.processes import Processes
from ptq4sam.sweep.scheduler import schedule
from ptq4sam.sweep.store import Store
from tests.sweep.fake_workers import FakeWorker, task


def environment(number: int) -> dict[str, str]:
    return {"FAKE_WORKER": f"number {number}"}


def test_a_worker_that_is_killed_costs_its_trial_alone(tmp_path: Path) -> None:
    labels = ["slow", "killed", "slow", "exits", "fails", "slow", "slow", "slow"]
    tasks = [task(str(number), label) for number, label in enumerate(labels)]
    with (
        Processes(FakeWorker, 2, tmp_path / "logs", environment) as pool,
        Store(tmp_path / "s.sqlite") as store,
    ):
        state = schedule(tasks, pool, store, {})
    records = [state.records[str(number)] for number in range(len(labels))]
    assert [record.status == "done" for record in records] == [one == "slow" for one in labels]
    assert "killed (signal 9), as the system does when memory is used up" in records[1].error
    assert "ended with status 7" in records[3].error
    assert records[4].error == "out of memory"
    done = [record for record in records if record.status == "done"]
    # Two workers did all, one process each until it was killed; how they share it is a matter of
    # how soon a killed one is back.
    assert {record.worker.split()[1] for record in records} == {"0", "1"}
    assert len({record.metrics["process"] for record in done}) <= 4
    assert all(
        record.metrics["environment"] == f"number {record.worker.split()[1]}" for record in done
    )
    assert "FAKE_WORKER" not in os.environ


def test_why_a_worker_ended_is_in_its_log(tmp_path: Path) -> None:
    with Processes(FakeWorker, 1, tmp_path / "logs") as pool:
        pool.give(task("a", "raises"))
        ((_, outcome),) = pool.wait(60)
    assert "ended with status 1: its log is in workers/" in str(outcome.error)
    log = (tmp_path / "logs" / "worker0.log").read_text()
    assert "RuntimeError: not an outcome" in log
    assert "lost sys.stderr" not in log


def test_the_end_of_a_sweep_ends_its_workers(tmp_path: Path) -> None:
    with Processes(FakeWorker, 2, tmp_path / "logs") as pool:
        pool.give(task("a", "long"))
        assert pool.free == 1
        assert pool.wait(0.01) == []
        begun = time.monotonic()
    assert time.monotonic() - begun < 10
