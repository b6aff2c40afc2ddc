"""Records of trials in an SQLite file: appended one by one, never changed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ptq4sam.errors import StoreError
from ptq4sam.files import finite
from ptq4sam.locks import alone_in

_APPLICATION = 0x50345341
"""Marks the file as ours (SQLite's application_id)."""
_VERSION = 1
_PATIENCE = 10.0
"""Seconds that a writer waits for another program that reads or writes the file."""

_SCHEMA = """
CREATE TABLE trials (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    key TEXT NOT NULL,
    name TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('done', 'failed')),
    seed INTEGER NOT NULL,
    settings TEXT NOT NULL,
    scheme TEXT NOT NULL,
    metrics TEXT NOT NULL,
    stages TEXT NOT NULL,  -- `phases` of a record
    versions TEXT NOT NULL,
    seconds REAL NOT NULL,
    started TEXT NOT NULL,
    worker TEXT NOT NULL,
    error TEXT NOT NULL,
    log TEXT NOT NULL
);
CREATE INDEX trials_by_key ON trials (key);
"""
_JSON = ("settings", "metrics", "phases", "versions")


@dataclass(frozen=True)
class TrialRecord:
    """What is known of a trial that has ended.

    Attributes:
        key: identifies its settings.
        name: its values in one line.
        status: "done" or "failed".
        seed: its seed.
        settings: all its settings.
        scheme: the scheme as YAML, to run it again.
        metrics: AP, mean IoU, agreement and the like; empty where it failed.
        phases: seconds and peak memory of each phase.
        versions: of packages, and the machine.
        seconds: from its start to its record.
        started: when, ISO 8601 in UTC.
        worker: who did it.
        error: why it failed, in one line.
        log: what it logged.
    """

    key: str
    name: str
    status: str
    seed: int
    settings: dict[str, Any]
    scheme: str
    metrics: dict[str, Any] = field(default_factory=dict)
    phases: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    started: str = ""
    worker: str = ""
    error: str = ""
    log: str = ""


class Store:
    """The file; use it in a `with` block.

    It is in WAL mode: others may read it while a sweep writes. One sweep at a time has it, and its
    folder.

    Args:
        path: made where it is missing.

    Raises:
        StoreError: another run uses the folder, or the file is damaged, of another program or
            newer.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with contextlib.ExitStack() as opened:
            opened.enter_context(alone_in(path.parent))
            with _named_errors(path):
                self._connection = sqlite3.connect(path, timeout=_PATIENCE, isolation_level=None)
                opened.callback(self._connection.close)
                self._open()
            self._opened = opened.pop_all()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def append(self, record: TrialRecord) -> None:
        """Add a record; it is there for good when this returns.

        Raises:
            StoreError: the file is locked or damaged, or the disk is full.
        """
        row = asdict(record)
        row.update({name: json.dumps(finite(row[name]), allow_nan=False) for name in _JSON})
        names = ", ".join(map(_column, row))
        marks = ", ".join(f":{name}" for name in row)
        with self._transaction():
            self._connection.execute(f"INSERT INTO trials ({names}) VALUES ({marks})", row)

    def latest(self) -> dict[str, TrialRecord]:
        """The last record of each trial, by key.

        Raises:
            StoreError: the file is locked or damaged.
        """
        with _named_errors(self.path):
            return _latest(self._connection)

    def _open(self) -> None:
        run = self._connection.execute
        tables = _check(self._connection, self.path)
        run("PRAGMA journal_mode=WAL")
        # Also after a power failure what was recorded is there.
        run("PRAGMA synchronous=FULL")
        if not tables:
            with self._transaction():
                for statement in filter(str.strip, _SCHEMA.split(";")):
                    run(statement)
                run(f"PRAGMA application_id={_APPLICATION}")
                run(f"PRAGMA user_version={_VERSION}")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with _named_errors(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")


def read_records(path: Path) -> dict[str, TrialRecord]:
    """The last record of each trial, by key, without writing: also while a sweep is running.

    Args:
        path: the file.

    Raises:
        StoreError: it is missing, locked, damaged, of another program or newer.
    """
    with _named_errors(path):
        connection = sqlite3.connect(
            f"{path.resolve().as_uri()}?mode=ro", timeout=_PATIENCE, uri=True
        )
        with contextlib.closing(connection):
            return _latest(connection) if _check(connection, path) else {}


def _check(connection: sqlite3.Connection, path: Path) -> int:
    """Number of tables of a file that is ours and whole."""
    run = connection.execute
    (tables,) = run("SELECT count(*) FROM sqlite_master").fetchone()
    (application,) = run("PRAGMA application_id").fetchone()
    (version,) = run("PRAGMA user_version").fetchone()
    if tables and application != _APPLICATION:
        raise StoreError(f"{path} is another program's file: name another work directory")
    if version > _VERSION:
        raise StoreError(f"{path} was written by a newer ptq4sam: use that one")
    (problem,) = run("PRAGMA quick_check(1)").fetchone()
    if problem != "ok":
        raise _damaged(path, problem)
    return int(tables)


def _column(name: str) -> str:
    """The column of a record's field."""
    return "stages" if name == "phases" else name


def _latest(connection: sqlite3.Connection) -> dict[str, TrialRecord]:
    names = [one.name for one in fields(TrialRecord)]
    rows = connection.execute(
        f"SELECT {', '.join(map(_column, names))} FROM trials ORDER BY number"
    ).fetchall()
    found = (dict(zip(names, row, strict=True)) for row in rows)
    records = [
        TrialRecord(**{**row, **{name: json.loads(row[name]) for name in _JSON}}) for row in found
    ]
    return {record.key: record for record in records}


@contextlib.contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        if "locked" in str(error) or "busy" in str(error):
            raise StoreError(
                f"{path} has been locked by another program for {_PATIENCE:.0f} s: close "
                "that, then start the sweep again, which goes on where it was"
            ) from error
        problem = os.strerror(errno.ENOSPC) if "is full" in str(error) else str(error)
        raise StoreError(
            f"{path}: {problem}: make room or get permission, then start the sweep again, which "
            "goes on where it was"
        ) from error
    except (sqlite3.DatabaseError, ValueError) as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, problem: str) -> StoreError:
    return StoreError(
        f"{path} is damaged ({' '.join(problem.split())[:100]}): move it aside to start "
        f"again, or rescue its records by sqlite3 {path.name} .recover"
    )
