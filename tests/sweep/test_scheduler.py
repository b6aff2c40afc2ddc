from __future__ import annotations

from pathlib import Path

from ptq4sam.sweep.scheduler import State, schedule
from ptq4sam.sweep.store import Store
from tests.sweep.fake_workers import FakeWorker, InlinePool, task


def test_needs_come_first_and_once(tmp_path: Path) -> None:
    tasks = [
        task("boxes", kind="boxes"),
        task("float", needs=("boxes",), kind="float"),
        task("a", needs=("float",)),
        task("b", needs=("float",)),
    ]
    pool = InlinePool(FakeWorker(0, 1))
    with Store(tmp_path / "s.sqlite") as store:
        state = schedule(tasks, pool, store, {})
        assert state.records == store.latest()
    assert [given.key for given in pool.given] == ["boxes", "float", "a", "b"]
    assert state.shared == {"boxes": 1, "float": 1}
    record = state.records["a"]
    assert (record.status, record.metrics["AP"], record.log) == ("done", 10.0, "log of a")
    assert record.started.endswith("+00:00")


def test_a_failure_costs_only_what_needs_it(tmp_path: Path) -> None:
    tasks = [
        task("boxes", "fails", kind="boxes"),
        task("float", needs=("boxes",), kind="float"),
        task("a", needs=("float",)),
        task("b", "fails"),
        task("c"),
    ]
    with Store(tmp_path / "s.sqlite") as store:
        state = schedule(tasks, InlinePool(FakeWorker(0, 1)), store, {})
        assert state.records == store.latest()
    assert {key: record.status for key, record in state.records.items()} == {
        "a": "failed",
        "b": "failed",
        "c": "done",
    }
    assert state.records["a"].error == "float: fails: out of memory"
    # What it needed knows why.
    assert state.records["a"].log == "log of boxes"
    assert state.records["b"].error == "out of memory"


def test_time_left_by_the_mean_of_what_has_ended() -> None:
    state = State([task("a"), task("f", kind="float"), task("b")], {})
    assert state.time_left(1) is None
    state.seconds = [4.0, 8.0]
    assert (state.time_left(1), state.time_left(2)) == (12.0, 6.0)
