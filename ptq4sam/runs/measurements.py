"""Measured values on disk, so that a killed run does not measure them again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ptq4sam import parallel
from ptq4sam.files import write_json
from ptq4sam.model.journal import read_own

_log = logging.getLogger(__name__)

_TOGETHER = 64
"""Values in a file: all of it is written anew for each."""


class Measurements:
    """Values by name, in JSON files; several processes (see `parallel`) share the first's.

    Args:
        path: the first file, others are beside it; its folder is made where it is missing.
        fingerprint: what the values depend on, by name.
        resume: go on with what the file has; else it is written anew.

    Raises:
        ConfigError: the file is of another run; the message says what differs.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, str], *, resume: bool) -> None:
        self._path, self._fingerprint = path, dict(fingerprint)
        self._values: dict[str, Any] = {}
        self._newest: dict[str, Any] = {}
        self._full = 0
        if not parallel.is_first():
            return
        while (file := self._file(self._full)).exists():
            if resume:
                self._values |= read_own(file, "file of measurements", "values", self._fingerprint)
            else:
                file.unlink()
            self._full += 1
        if resume and self._values:
            _log.info("going on after %d measurements in %s", len(self._values), path)
        self._full = self._full if resume else 0

    def _file(self, index: int) -> Path:
        return self._path.with_suffix(f".{index}.json") if index else self._path

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
            self._values[name] = self._newest[name] = measured
            content = {"fingerprint": self._fingerprint, "values": self._newest}
            write_json(content, self._file(self._full), compact=True)
            if len(self._newest) == _TOGETHER:
                self._newest, self._full = {}, self._full + 1
        return measured
