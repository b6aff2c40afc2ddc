"""How long work shows how far it is: a function that wraps a sequence of steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """Wraps steps so that someone may watch them being consumed."""

    def __call__(self, steps: Sequence[T], description: str) -> Iterable[T]:
        """Give the steps back one by one."""


def silent(steps: Sequence[T], description: str) -> Iterable[T]:
    """Show nothing."""
    return steps


def bars(steps: Sequence[T], description: str) -> Iterable[T]:
    """Show a bar with time left on the terminal, or nothing where there is none."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(
        steps, description, total=len(steps), console=console, disable=not console.is_terminal
    )
