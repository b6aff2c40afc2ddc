"""The log of a run in its work directory."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from ptq4sam import parallel
from ptq4sam.errors import Ptq4samError, ResourceError, reason
from ptq4sam.extensions import fault_of_extension

LOG = "run.log"
"""Its name."""
ENDED = "the run has ended"
"""Begins the last line of the log of a run that came to its end."""


@contextlib.contextmanager
def package_log_to(handler: logging.Handler, level: int) -> Iterator[None]:
    """Give what the package logs, from a level on, to a handler too."""
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("ptq4sam")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@contextlib.contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Also write the package's log, with details, into a file, the first process's."""
    if not parallel.is_first():
        yield
        return
    handler = _LogFile(path)
    try:
        with package_log_to(handler, logging.DEBUG):
            yield
    except BaseException as error:
        # On the terminal it is told by whoever catches it.
        said = fault_of_extension(error) or " ".join(str(error).split()) or type(error).__name__
        expected = isinstance(error, Ptq4samError) or not isinstance(error, Exception)
        with contextlib.suppress(ResourceError):
            if not expected:
                handler.handle(_error("where it happened", error))
            handler.handle(_error(f"stopped: {said}"))
        raise
    finally:
        handler.close()


def _error(what: str, error: BaseException | None = None) -> logging.LogRecord:
    """A line of the log, and a traceback below it."""
    where = None if error is None else (type(error), error, error.__traceback__)
    return logging.LogRecord(__name__, logging.ERROR, "", 0, what, None, where)


class _LogFile(logging.FileHandler):
    """Ends the run where the log cannot be written: neither could its results.

    Raises:
        ResourceError: the disk is full, or gone; in whoever logs something.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, mode="w", encoding="utf-8")
        self._path = path

    def handleError(self, record: logging.LogRecord) -> None:
        """What the system refuses is an error of the run; others are logging's to show."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        # What it still holds cannot be written either. Closed, it takes nothing more.
        with contextlib.suppress(OSError):
            self.close()
        raise ResourceError(
            f"{self._path}: {reason(error)}: make room or name another work directory; a "
            "quantization can be resumed"
        ) from error
