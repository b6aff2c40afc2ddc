"""Which trials have ended, and which of those no longer count."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from ptq4sam.extensions import EXTENSIONS
from ptq4sam.sweep.grid import Sweep, Trial
from ptq4sam.sweep.store import TrialRecord, read_records
from ptq4sam.sweep.tasks import Folder


def ended_lines(sweep: Sweep, folder: Folder) -> list[str]:
    """How many trials have ended, for whoever asks before anything is done.

    Raises:
        StoreError: the records are damaged.
    """
    records = read_records(folder.store) if folder.store.exists() else {}
    there = sum(trial.key in records for trial in sweep.trials)
    lines = [f"{len(sweep.trials)} trials, {there} of them ended before"]
    return [*lines, *filter(None, [told_of_others(sweep.trials, records)])]


def told_of_others(trials: Iterable[Trial], records: Mapping[str, TrialRecord]) -> str:
    """How many trials ended with other extensions than those of now, in a line; empty if none.

    Keys hold the bytes of extensions, so that an edited file makes all trials new.

    Args:
        trials: of the sweep.
        records: by key.
    """
    known = {_settings(record.settings) for record in records.values()}
    without = [trial for trial in trials if trial.key not in records]
    count = sum(_settings(trial.settings.to_dict()) in known for trial in without)
    if not count:
        return ""
    names = [Path(name).name for name in os.environ.get(EXTENSIONS, "").split(os.pathsep) if name]
    versions = f"with other versions of {', '.join(names)}" if names else "with other extensions"
    which, they = ("1 trial", "it does") if count == 1 else (f"{count} trials", "they do")
    return f"{which} ended {versions} ({EXTENSIONS}): {they} not count"


def _settings(plain: Mapping[str, object]) -> str:
    return json.dumps(plain)
