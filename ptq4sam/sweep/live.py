"""A sweep on the terminal: trials as they end, progress, time left."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ptq4sam.sizes import format_seconds
from ptq4sam.sweep.grid import Sweep
from ptq4sam.sweep.scheduler import State
from ptq4sam.sweep.summary import Row, float_lines, rows, table, table_over_seeds

_OTHER_LINES = 8
"""Of the terminal, beside the trials."""


@contextlib.contextmanager
def showing(sweep: Sweep, workers: int, console: Console) -> Iterator[Callable[[State], None]]:
    """A function that shows a state in place; it does nothing where there is no terminal."""
    if not console.is_terminal:
        yield lambda _state: None
        return
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        begun = time.monotonic()

        def show(state: State) -> None:
            live.update(picture(sweep, state, workers, time.monotonic() - begun, console.height))

        yield show


def picture(
    sweep: Sweep, state: State, workers: int, elapsed: float, height: int
) -> RenderableType:
    """How far a sweep is.

    Args:
        sweep: its trials.
        state: what has become of them.
        workers: how many there are.
        elapsed: seconds since it began.
        height: lines of the terminal.
    """
    every = rows(sweep, state.records)
    ended = [row for row in every if row.record is not None]
    room = max(1, height - _OTHER_LINES - len(state.running))
    parts: list[RenderableType] = []
    if ended:
        if len(ended) > room:
            parts.append(Text(f"... {len(ended) - room} trials before", style="dim"))
        parts.append(_rich_table(table(sweep, ended[-room:], brief=True)))
    now = time.monotonic()
    parts += [
        Text(f"{'running':<9}{task.label} ({format_seconds(now - started)})", style="cyan")
        for task, started in state.running.values()
    ]
    failed = sum(row.status == "failed" for row in ended)
    left = state.time_left(workers)
    words = [f"{len(ended)} of {len(every)} trials", f"{failed} failed" if failed else ""]
    words += [f"{format_seconds(elapsed)} so far"]
    words += ["" if left is None else f"about {format_seconds(left)} left"]
    parts.append(ProgressBar(total=len(every), completed=len(ended), width=60))
    parts.append(Text(", ".join(filter(None, words))))
    return Group(*parts)


def tell(sweep: Sweep, found: Sequence[Row], console: Console) -> None:
    """The tables of a sweep that has ended."""
    for line in float_lines(found):
        console.print(line)
    averaged = table_over_seeds(sweep, found, brief=True)
    console.print(_rich_table(table(sweep, found, brief=True)))
    if averaged:
        console.print("over seeds, mean ± standard deviation:")
        console.print(_rich_table(averaged))


def _rich_table(lines: Sequence[Sequence[str]]) -> Table:
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in lines[0]:
        left = title == "status"
        shown.add_column(title, justify="left" if left else "right", overflow="fold")
    for line in lines[1:]:
        shown.add_row(*map(Text, line), style="red" if line[-1].startswith("failed") else None)
    return shown
