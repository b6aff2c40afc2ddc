"""A sweep's trials as a file in its work directory, for whoever reads its records later."""

from __future__ import annotations

from pathlib import Path

from ptq4sam.errors import ConfigError, DataError
from ptq4sam.files import read_json, write_json
from ptq4sam.sweep.grid import Sweep, Trial
from ptq4sam.sweep.settings import TrialSettings


def write_description(sweep: Sweep, path: Path) -> None:
    """Write a sweep's name and trials."""
    trials = [
        {"values": trial.values, "settings": trial.settings.to_dict(), "key": trial.key}
        for trial in sweep.trials
    ]
    write_json({"name": sweep.name, "trials": trials}, path, compact=True)


def read_description(path: Path) -> Sweep:
    """The sweep of a file.

    Raises:
        DataError: it is missing or damaged, or names what only an extension has.
    """
    if not path.exists():
        raise DataError(
            f"there is no {path}, which says what the trials are: start the sweep again with this "
            "work directory, which repeats nothing and writes it"
        )
    content, _ = read_json(path, "description of a sweep")
    try:
        return Sweep(content["name"], tuple(_trial(one) for one in content["trials"]))
    except (ConfigError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} cannot be read ({error}): if it is damaged, start the sweep again, which "
            "repeats nothing and writes it anew"
        ) from error


def _trial(content: dict[str, object]) -> Trial:
    settings = TrialSettings.from_dict(content["settings"])
    values, key = content["values"], content["key"]
    if not isinstance(values, dict) or not isinstance(key, str):
        raise TypeError(f"values {values!r}, key {key!r}")
    # The key of the records: extensions, which are in it, may be others than those of the sweep.
    return Trial(values, settings, key)
