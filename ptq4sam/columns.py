"""Tables of text for a terminal: numbers are never cut, long names have lines of their own."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Collection, Sequence

_GAP = 2
_NAME = 16
"""Room for the first cells that is worth two spaces between columns."""


def terminal_width() -> int | None:
    """Characters of a line on standard output; None where that is no terminal, but a file."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def wrapped(text: str, width: int | None, indent: str = "") -> str:
    """A sentence in lines of at most so many characters, words whole; one line without a width."""
    if width is None:
        return indent + text
    # A name with hyphens is to be copied, so that it stays whole.
    return textwrap.fill(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )


def aligned(
    lines: Sequence[Sequence[str]], left: Collection[int] = (0,), width: int | None = None
) -> list[str]:
    """Cells in columns, each as wide as its widest cell.

    Where that is too wide, a first cell that has no room beside the others stands on a line above
    them; where hardly one has, columns are one space apart instead of two. Cells are always whole.

    Args:
        lines: first the titles, which may have several lines each. A line of one cell is a heading
            for those below it.
        left: columns whose cells begin at one place; those of the others end at one.
        width: of the terminal; None for no limit.

    Returns:
        The text of each line, which may hold line breaks.
    """
    tables = [_heads(lines[0]) if number == 0 else [line] for number, line in enumerate(lines)]
    rows = [row for table in tables for row in table if len(row) > 1]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    others, gap = sum(widths[1:]), _GAP
    if width is not None:
        between = len(widths) - 1
        gap = _GAP if width - others - _GAP * between >= min(widths[0], _NAME) else 1
        room = width - others - gap * between
        widths[0] = max((len(row[0]) for row in rows if len(row[0]) <= room), default=0)

    def text(row: Sequence[str]) -> str:
        if len(row) == 1:
            return row[0]
        above, first = ("", row[0]) if len(row[0]) <= widths[0] else (f"{row[0]}\n", "")
        cells = zip((first, *row[1:]), widths, strict=True)
        shown = [
            cell.ljust(wide) if column in left else cell.rjust(wide)
            for column, (cell, wide) in enumerate(cells)
        ]
        return above + (" " * gap).join(shown).rstrip()

    return ["\n".join(map(text, table)) for table in tables]


def _heads(titles: Sequence[str]) -> list[list[str]]:
    """Titles as lines of cells, so that all end on the last line."""
    parts = [title.split("\n") for title in titles]
    height = max(map(len, parts))
    return [list(row) for row in zip(*([""] * (height - len(p)) + p for p in parts), strict=True)]
