"""Measured values on disk, so that a killed run does not measure them again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ptq4sam import parallel
from ptq4sam.files import read_json, write_json
from ptq4sam.model.journal import require_same

_log = logging.getLogger(__name__)


class Measurements:
    """Values by name, in one JSON file; several processes (see `parallel`) share the first's.

    Args:
        path: the file; its folder is made where it is missing.
        fingerprint: what the values depend on, by name.
        resume: go on with what the file has; else it is written anew.

    Raises:
        ConfigError: the file is of another run; the message says what differs.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, str], *, resume: bool) -> None:
        self._path, self._fingerprint = path, dict(fingerprint)
        self._values: dict[str, Any] = {}
        if parallel.is_first() and resume and path.exists():
            content, _ = read_json(path, "file of measurements")
            require_same(path, content["fingerprint"], self._fingerprint)
            self._values = content["values"]
            _log.info("going on after %d measurements in %s", len(self._values), path)

    def value(self, name: str, measure: Callable[[], Any]) -> Any:
        """The value of a name, measured where it is not known.

        Args:
            name: what it is, and all that tells it from others of this run.
            measure: gives what JSON can hold exactly; called by all processes or none.
        """
        known = parallel.from_first(lambda: self._values.get(name))
        if known is not None:
            return known
        measured = measure()
        if parallel.is_first():
            self._values[name] = measured
            content = {"fingerprint": self._fingerprint, "values": self._values}
            write_json(content, self._path, compact=True)
        return measured
