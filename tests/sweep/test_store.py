from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from ptq4sam.errors import StoreError
from ptq4sam.sweep import store as stores
from ptq4sam.sweep.store import Store, TrialRecord


def record(key: str, status: str = "done", **more: object) -> TrialRecord:
    return TrialRecord(key, f"trial {key}", status, 3, {"bits": 4}, "a: 1", **more)  # type: ignore[arg-type]


def test_records_are_there_after_closing_and_the_last_of_a_trial_counts(tmp_path: Path) -> None:
    path = tmp_path / "new" / "sweep.sqlite"
    with Store(path) as store:
        assert store.latest() == {}
        store.append(record("a", "failed", error="no"))
        store.append(record("b", metrics={"AP": 1.5, "APl": float("nan")}, log="äöü\n"))
        store.append(record("a"))
    with Store(path) as store:
        found = store.latest()
    assert found["a"] == record("a")
    assert found["b"].metrics == {"AP": 1.5, "APl": None}
    assert found["b"].log == "äöü\n"
    # Nothing was changed or removed: all three are in the file.
    with sqlite3.connect(path) as plain:
        rows = plain.execute("SELECT key, status FROM trials ORDER BY number").fetchall()
        assert plain.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert rows == [("a", "failed"), ("b", "done"), ("a", "done")]


def test_a_killed_writer_leaves_what_it_had_recorded(tmp_path: Path) -> None:
    path = tmp_path / "sweep.sqlite"
    script = "\n".join(
        [
            "import os, sys; from pathlib import Path",
            "from ptq4sam.sweep.store import Store, TrialRecord",
            "store = Store(Path(sys.argv[1]))",
            "store.append(TrialRecord('a', '', 'done', 0, {}, ''))",
            "with store._transaction():",
            "    store._connection.execute(\"UPDATE trials SET key = 'b'\")",
            "    os.kill(os.getpid(), 9)",
        ]
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], env=environment, check=False, timeout=120
    )
    assert done.returncode == -9
    with Store(path) as store:
        assert list(store.latest()) == ["a"]
        store.append(record("c"))
        assert list(store.latest()) == ["a", "c"]


def test_one_sweep_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "sweep.sqlite"
    with Store(path), pytest.raises(StoreError, match="belongs to a sweep that is running"):
        Store(path)
    with Store(path) as store:
        assert store.latest() == {}


def test_a_file_that_another_program_has_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "_PATIENCE", 0.1)
    path = tmp_path / "sweep.sqlite"
    with Store(path) as store:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="locked by another program"):
            store.append(record("a"))
        # Reading is possible all the time.
        assert store.latest() == {}
        other.execute("ROLLBACK")
        store.append(record("a"))
        assert list(store.latest()) == ["a"]
        other.close()


@pytest.mark.parametrize("place", [0, 40, 2000])
def test_a_damaged_file(tmp_path: Path, place: int) -> None:
    path = tmp_path / "sweep.sqlite"
    with Store(path) as store:
        for number in range(50):
            store.append(record(f"k{number}", log="x" * 500))
    content = bytearray(path.read_bytes())
    content[place : place + 3000] = b"\xff" * 3000
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"sweep\.sqlite"):
        Store(path)


def test_files_of_others(tmp_path: Path) -> None:
    path = tmp_path / "sweep.sqlite"
    path.write_text("no data base at all, but some text" * 50)
    with pytest.raises(StoreError, match="is damaged"):
        Store(path)
    path.unlink()
    with sqlite3.connect(path) as plain:
        plain.execute("CREATE TABLE birds (name TEXT)")
    plain.close()
    with pytest.raises(StoreError, match="another program's file"):
        Store(path)
    path.unlink()
    Store(path).__exit__(None, None, None)
    with sqlite3.connect(path) as plain:
        plain.execute("PRAGMA user_version=99")
    plain.close()
    with pytest.raises(StoreError, match="newer ptq4sam"):
        Store(path)
