"""A sweep on the terminal: trials as they end, progress, time left."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console, ConsoleDimensions, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from ptq4sam.columns import aligned, wrapped
from ptq4sam.progress import Ticker
from ptq4sam.sizes import format_seconds
from ptq4sam.sweep.grid import Sweep
from ptq4sam.sweep.scheduler import State
from ptq4sam.sweep.summary import Row, float_lines, rows, table, table_over_seeds

_OTHER_LINES = 8
"""Of the terminal, beside the trials."""


@contextlib.contextmanager
def showing(sweep: Sweep, workers: int, console: Console) -> Iterator[Callable[[State], None]]:
    """A function that shows a state in place, or where there is no terminal a line now and then."""
    begun = time.monotonic()
    if not console.is_terminal:
        ticker = Ticker()
        yield lambda state: ticker.tell(
            lambda: _words(sweep, state, workers, time.monotonic() - begun)
        )
        return
    with Live(console=console, refresh_per_second=4, transient=True) as live:

        def show(state: State) -> None:
            live.update(picture(sweep, state, workers, time.monotonic() - begun, console.size))

        yield show


def picture(
    sweep: Sweep, state: State, workers: int, elapsed: float, size: ConsoleDimensions
) -> RenderableType:
    """How far a sweep is.

    Args:
        sweep: its trials.
        state: what has become of them.
        workers: how many there are.
        elapsed: seconds since it began.
        size: of the terminal.
    """
    every = rows(sweep, state.records)
    ended = [row for row in every if row.record is not None]
    room = max(1, size.height - _OTHER_LINES - len(state.running))
    parts: list[RenderableType] = []
    if ended:
        if len(ended) > room:
            parts.append(Text(f"... {len(ended) - room} trials before", style="dim"))
        lines = table(sweep, ended[-room:], brief=True)
        parts.append(_shown(lines, len(sweep.axes), size.width))
    now = time.monotonic()
    parts += [
        Text(f"{'running':<9}{task.label} ({format_seconds(now - started)})", style="cyan")
        for task, started in state.running.values()
    ]
    parts.append(ProgressBar(total=len(every), completed=len(ended), width=60))
    # The bar does not end its line.
    parts.append(Text("\n" + _words(sweep, state, workers, elapsed)))
    return Group(*parts)


def _words(sweep: Sweep, state: State, workers: int, elapsed: float) -> str:
    """How far a sweep is, in a line."""
    every = rows(sweep, state.records)
    statuses = [row.status for row in every if row.record is not None]
    failed, left = statuses.count("failed"), state.time_left(workers)
    words = [f"{len(statuses)} of {len(every)} trials", f"{failed} failed" if failed else ""]
    words += [f"{format_seconds(elapsed)} so far"]
    words += ["" if left is None else f"about {format_seconds(left)} left"]
    return ", ".join(filter(None, words))


def tell(sweep: Sweep, found: Sequence[Row], console: Console, width: int | None = None) -> None:
    """The tables of a sweep that has ended.

    Args:
        sweep: its trials.
        found: what has become of them.
        console: where.
        width: of the terminal; None for no limit.
    """
    for line in float_lines(found):
        console.print(line, markup=False, highlight=False)
    averaged = table_over_seeds(sweep, found, brief=True)
    console.print(_shown(table(sweep, found, brief=True), len(sweep.axes), width))
    if averaged:
        console.print("over seeds, mean ± standard deviation:")
        console.print(_shown(averaged, len(sweep.axes) - 1, width))


def _shown(lines: Sequence[Sequence[str]], axes: int, width: int | None) -> Group:
    """A table of trials.

    Args:
        lines: titles, then cells.
        axes: how many columns are what tells trials apart; where the table is too wide, they become
            one.
        width: of the terminal; None for no limit.
    """
    titles = [title.replace(" ", "\n") for title in lines[0]]
    rows = [[*row[:-1], row[-1].partition(": ")[0]] for row in lines[1:]]
    texts = _aligned([titles, *rows], axes, width)
    if width is not None and max(len(part) for text in texts for part in text.split("\n")) > width:
        named = [[_named(lines[0], row, axes), *row[axes:]] for row in rows]
        texts = _aligned([["trial", *titles[axes:]], *named], 1, width)
    shown = [Text(texts[0], style="bold")]
    for text, row in zip(texts[1:], lines[1:], strict=True):
        status, _, problem = row[-1].partition(": ")
        style = "red" if status == "failed" else ""
        shown.append(Text(text, style))
        if problem:
            shown.append(Text(wrapped(problem, width, "  "), style))
    return Group(*shown)


def _aligned(table: Sequence[Sequence[str]], axes: int, width: int | None) -> list[str]:
    last = len(table[0]) - 1
    left = {*range(axes), *([last] if table[0][last] == "status" else [])}
    return aligned(table, left, width)


def _named(titles: Sequence[str], row: Sequence[str], axes: int) -> str:
    """What tells a trial apart, as one text."""
    named = zip(titles[:axes], row, strict=False)
    return ", ".join(f"{title}={value}" for title, value in named if value)
