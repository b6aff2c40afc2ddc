"""What every command does around its action: a log on stderr, named errors as one line."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from ptq4sam.errors import (
    MissingError,
    Ptq4samError,
    gpu_memory_advice,
    in_one_line,
    is_out_of_memory,
)
from ptq4sam.extensions import fault_of_extension


def guarded(action: Callable[[], int], verbose: bool = False, goes_on: str = "") -> int:
    """Run an action with the log on stderr and named errors as one line.

    So are errors in code of extensions, whose traceback is in the log's details.
    What the terminal's encoding lacks, as Windows' own lack most letters, is written as an escape.

    Args:
        action: gives the exit status.
        verbose: log details.
        goes_on: how an interrupted one goes on, where it does.
    """
    from rich.console import Console
    from rich.logging import RichHandler

    from ptq4sam.allocator import keep_freed_memory

    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    console = Console(stderr=True)
    handler = RichHandler(console=console, show_path=False, log_time_format="[%X]")
    logger = logging.getLogger("ptq4sam")
    level = logging.DEBUG if verbose else logging.INFO
    # The log of a run in its work directory has details whether the terminal shows them or not.
    handler.setLevel(level)
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        with _ending_in_order():
            status = action()
        sys.stdout.flush()
        return status
    except MissingError as error:
        sys.stderr.write(f"error: {error.listing}\n")
        return 2
    except Ptq4samError as error:
        return _refuse(str(error))
    except OSError as error:
        # A full disk, no permission: the user's to mend, wherever it happens.
        logger.debug("where it happened", exc_info=True)
        lost = error.filename is None and _is_output_lost()
        return _refuse(f"{'standard output: ' if lost else ''}{in_one_line(error)}")
    except Exception as error:
        fault = None if is_out_of_memory(error) else fault_of_extension(error)
        if fault is None and not is_out_of_memory(error):
            raise
        logger.debug("where it happened", exc_info=True)
        if fault is not None:
            return _refuse(fault)
        what = str(error)[:120] or "in Python"
        return _refuse(
            f"out of memory ({what}): lower the memory budget, or calibrate on fewer "
            "pictures (calibrate in the scheme); finished units are kept: resume the run"
            f"{gpu_memory_advice(error)}"
        )
    except KeyboardInterrupt as error:
        what, status = ("ended", 143) if isinstance(error, _Terminated) else ("interrupted", 130)
        sys.stderr.write(f"{what}{goes_on and f': {goes_on}'}\n")
        return status
    finally:
        logger.removeHandler(handler)


class _Terminated(KeyboardInterrupt):
    """The system, a scheduler or a shell asked the process to end."""


@contextlib.contextmanager
def _ending_in_order() -> Iterator[None]:
    """Whoever ends the process by SIGTERM interrupts it, as Ctrl-C does, in the `with` block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(_number: int, _frame: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _is_output_lost() -> bool:
    """Whether standard output takes no line; it is given up then, or Python would complain."""
    try:
        sys.stdout.write("\n")
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _refuse(problem: str) -> int:
    sys.stderr.write(f"error: {' '.join(problem.split())}\n")
    return 2
