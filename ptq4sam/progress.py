"""How long work shows how far it is: a function that wraps a sequence of steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

from ptq4sam.sizes import format_seconds

_log = logging.getLogger(__name__)

T = TypeVar("T")

_BAR = 26
"""Characters for a short bar, percents and the time that is left."""


class Progress(Protocol):
    """Wraps steps so that someone may watch them being consumed."""

    def __call__(self, steps: Sequence[T], description: str) -> Iterable[T]:
        """Give the steps back one by one."""


def silent(steps: Sequence[T], description: str) -> Iterable[T]:
    """Show nothing."""
    return steps


def bars(steps: Sequence[T], description: str) -> Iterable[T]:
    """Show a bar with time left on the terminal, or a line now and then where there is none."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    if not console.is_terminal:
        return told(steps, description, Ticker())
    shown = shortened(description, console.width - _BAR)
    return track(steps, shown, total=len(steps), console=console)


def shortened(text: str, room: int) -> str:
    """A description of so many characters: of one that is longer its first word and its end."""
    if len(text) <= room:
        return text
    first = text.partition(" ")[0] + " ..."
    return first + text[-max(room - len(first), 1) :]


class Ticker:
    """Logs a line where the last one was half a minute ago, counted from its making.

    Args:
        pause: seconds between lines.
        clock: tells seconds.
    """

    def __init__(self, pause: float = 30.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self._pause = clock, pause
        self.begun = self._last = clock()

    def tell(self, line: Callable[[], str]) -> None:
        """Log the line, if it is time for one; only then it is made."""
        now = self.clock()
        if now - self._last >= self._pause:
            self._last = now
            _log.info("%s", line())


def told(steps: Sequence[T], description: str, ticker: Ticker) -> Iterator[T]:
    """Log how many steps are done and how long the rest may take, whenever a ticker lets it."""

    def line() -> str:
        spent = ticker.clock() - ticker.begun
        left = f", about {format_seconds(spent / done * (len(steps) - done))} left" if done else ""
        return f"{description}: {done} of {len(steps)}, {format_seconds(spent)} so far{left}"

    for done, step in enumerate(steps):  # noqa: B007  # used by line()
        ticker.tell(line)
        yield step
