"""What every command does around its action: a log on stderr, named errors as one line."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

from ptq4sam.errors import Ptq4samError, is_out_of_memory


def guarded(action: Callable[[], int], verbose: bool = False) -> int:
    """Run an action with the log on stderr and named errors as one line."""
    from rich.console import Console
    from rich.logging import RichHandler

    from ptq4sam.allocator import keep_freed_memory

    keep_freed_memory()
    console = Console(stderr=True)
    handler = RichHandler(console=console, show_path=False, log_time_format="[%X]")
    logger = logging.getLogger("ptq4sam")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    try:
        return action()
    except Ptq4samError as error:
        return _refuse(str(error))
    except OSError as error:
        # A full disk, no permission: the user's to mend, wherever it happens.
        logger.debug("where it happened", exc_info=True)
        what = error.strerror or str(error) or type(error).__name__
        return _refuse(what if error.filename is None else f"{error.filename}: {what}")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        logger.debug("where it happened", exc_info=True)
        what = str(error)[:120] or "in Python"
        return _refuse(
            f"out of memory ({what}): lower --memory-budget, or calibrate on fewer pictures "
            "(calibrate in the scheme); finished units are kept, go on with --resume"
        )
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    finally:
        logger.removeHandler(handler)


def _refuse(problem: str) -> int:
    sys.stderr.write(f"error: {' '.join(problem.split())}\n")
    return 2
