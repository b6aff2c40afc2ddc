"""The folder that a run writes into: its own while it lasts, with a log of what it does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ptq4sam import parallel
from ptq4sam.errors import StoreError
from ptq4sam.locks import alone_in
from ptq4sam.runs.run_log import LOG, logging_to


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Write into a work directory, and log there; errors as `claimed`."""
    with claimed(folder), logging_to(folder / LOG):
        yield


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """No other run writes into the folder within the `with` block.

    Several processes (see `parallel`) are one run.

    Raises:
        StoreError: another run does; every process of this one is told.
    """
    with contextlib.ExitStack() as stack:

        def claim() -> str | None:
            try:
                stack.enter_context(alone_in(folder))
            except StoreError as error:
                return str(error)
            return None

        refusal = parallel.from_first(claim)
        if refusal is not None:
            raise StoreError(refusal)
        yield
