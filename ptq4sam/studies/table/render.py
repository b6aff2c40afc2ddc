"""The table on a terminal, in Markdown, CSV and LaTeX, all from the same rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich.console import Group
from rich.text import Text

from ptq4sam.columns import aligned, wrapped
from ptq4sam.errors import ConfigError
from ptq4sam.files import write_text
from ptq4sam.studies.table.published import MARKS
from ptq4sam.studies.table.rows import MissingInput, Row, comparisons

_INFLATED = "*"
_TITLES = (
    "boxes",
    "SAM",
    "W / A",
    "method",
    "mean IoU",
    "AP",
    "to float",
    "large",
    "medium",
    "small",
    "MB saved",
    "published",
    "by size",
    "also",
    "corrected",
    "difference",
    "seconds",
    "status",
)
_CSV_TITLES = (
    *("detector", "boxes", "model", "bits", "method", "ap", "float_ap", "published"),
    *("published_mark", "inflated", "corrected", "corrected_mark", "difference", "status"),
    *("seconds", "problem", "key", "mean_iou", "float_mean_iou", "large", "medium", "small"),
    *("saved_mb", "published_by_size", "also", "also_mark"),
)
_LEFT = 4
"""Columns of words before those of numbers."""
_HEADINGS = 2
"""Columns that are headings on a terminal."""
_SHORT = tuple(
    {"to float": "to\nfloat", "mean IoU": "mean\nIoU", "MB saved": "MB\nsaved"}.get(title, title)
    for title in _TITLES[_HEADINGS:]
)
"""Titles of the other columns, for a terminal."""
_STYLES = {"failed": "red", "missing": "dim", "open": "dim"}
_MISSING = "missing: "


def cells(row: Row) -> list[str]:
    """A row as tables for people show it, in the order of the titles."""
    known = row.cell.published
    figure = "" if known.figure is None else str(known.figure)
    score = _number(row.score)
    sizes = [*map(_number, row.sizes)] or [""] * 3
    published_sizes = () if known.figure is None else known.figure.sizes
    problem = f": {row.problem}" if row.problem else ""
    return [
        row.cell.boxes,
        row.cell.model,
        row.cell.width,
        row.cell.method_title,
        *((score, "") if row.cell.metric == "mean_iou" else ("", score)),
        _number(row.change, signed=True),
        *sizes,
        "" if row.cell.saved is None else f"{row.cell.saved:.2f}",
        figure + (_INFLATED if known.inflated else ""),
        " / ".join(map(_number, published_sizes)),
        "" if known.also is None else str(known.also),
        "" if known.corrected is None else str(known.corrected),
        _number(row.difference, signed=True),
        "" if row.seconds is None else f"{row.seconds:.0f}",
        row.status + problem,
    ]


def terminal(rows: Sequence[Row], width: int | None = None) -> Group:
    """For rich: a heading for each detector and SAM; columns without any entry are left out.

    What cells lack is told once below a heading, errors of each.

    Args:
        rows: of the table.
        width: of the terminal; None for no limit.
    """
    lines = [cells(row)[_HEADINGS:] for row in rows]
    used = [c for c in range(len(_SHORT)) if any(line[c] for line in lines)]
    words = {place for place, c in enumerate(used) if c in (0, 1, len(_SHORT) - 1)}
    problems = [f"{row.status}: {row.problem}" if row.problem else "" for row in rows]
    for line, row in zip(lines, rows, strict=True):
        line[-1] = row.status
    table = [[line[c] for c in used] for line in [list(_SHORT), *lines]]
    head, *texts = aligned(table, words, width)
    shown, heading, lacking = [Text(head, style="bold")], "", ""
    for row, text, problem in zip(rows, texts, problems, strict=True):
        if heading != (heading := f"{row.cell.boxes}, {row.cell.model}"):
            shown.append(Text(heading))
            lacking = ""
        style = _STYLES.get(row.status, "")
        shown.append(Text(text, style))
        # Cells of a detector and a SAM mostly lack the same files.
        if problem and problem != lacking:
            shown.append(Text(wrapped(problem, width, "  "), style))
        if row.status == "missing":
            lacking = problem
    return Group(*shown)


def legend(rows: Sequence[Row]) -> list[str]:
    """What the columns of these rows mean, a line each."""
    lines = ["AP: mask AP in percent; to float: against the float model, in percentage points."]
    if any(row.cell.metric == "mean_iou" for row in rows):
        lines.append("mean IoU: of objects prompted by their annotated boxes, in percent.")
    if any(row.cell.by_size for row in rows):
        lines.append(
            "large, medium, small: the same of objects of that size, published by size alike; MB "
            "saved: 2^20 bytes of weights against float16, as the study counts them."
        )
    knowns = [row.cell.published for row in rows]
    marks = {
        figure.mark
        for known in knowns
        for figure in (known.figure, known.corrected, known.also)
        if figure is not None
    }
    if marks:
        told = "; ".join(f"{mark}: {what}" for mark, what in MARKS.items() if mark in marks)
        lines.append(f"published: {told}; -: collapsed.")
    if any(known.corrected is not None for known in knowns):
        lines.append(
            "corrected: measured by others with everything quantized. difference: to the "
            "corrected figure, where there is none to the published one."
        )
    elif marks:
        lines.append("difference: to the published figure.")
    if any(row.cell.published.inflated for row in rows):
        lines.append(f"{_INFLATED}: half of the activations were float when it was measured.")
    compared = list(comparisons(rows))
    if compared:
        lines.append(
            "agreement: mean IoU with the float model's masks, in points, with the interval of a "
            "paired bootstrap over pictures:"
        )
    return lines + compared


def how_to_get(missing: Iterable[MissingInput]) -> list[str]:
    """What to do for all that is missing, a line each."""
    unique = list(dict.fromkeys(missing))
    names = list(dict.fromkeys(one.asset for one in unique if one.asset is not None))
    lines = [f"{_MISSING}ptq4sam download {' '.join(names)}"] if names else []
    others = (
        one.remedy or f"{one.what} is not there: name another"
        for one in unique
        if one.asset is None
    )
    return lines + [f"{_MISSING}{other}" for other in dict.fromkeys(others)]


def markdown(rows: Sequence[Row], title: str, notes: Sequence[str]) -> str:
    """A page."""
    lines = [cells(row) for row in rows]
    shown = _used(lines)

    def line(entries: Sequence[str]) -> str:
        return "| " + " | ".join(entries[c].replace("|", "\\|") for c in shown) + " |"

    rule = "|" + "".join("---|" if c < _LEFT else "---:|" for c in shown)
    versions = sorted({row.versions for row in rows if row.versions})
    parts = [f"# {title}", "", *(f"{note}\n" for note in notes)]
    parts += [line(_TITLES), rule, *map(line, lines), ""]
    # A star and a hyphen mean something at the beginning of a line of Markdown.
    parts += [f"{text.replace('*', chr(92) + '*')}\n" for text in legend(rows)]
    parts += [f"Measured with {used}.\n" for used in versions]
    return "\n".join(parts).rstrip() + "\n"


def csv_text(rows: Sequence[Row]) -> str:
    """Every row with all that is known, for programs."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV_TITLES)
    for row in rows:
        cell, known = row.cell, row.cell.published
        figure, corrected, also = known.figure, known.corrected, known.also
        scores = row.score, row.float_score
        is_ap = cell.metric == "AP"
        writer.writerow(
            [
                *(cell.detector, cell.boxes, cell.model, cell.bits, cell.method),
                *(scores if is_ap else (None, None)),
                *((None, None) if figure is None else (figure.value, figure.mark)),
                known.inflated,
                *((None, None) if corrected is None else (corrected.value, corrected.mark)),
                *(row.difference, row.status, row.seconds, row.problem, cell.settings.key()),
                *((None, None) if is_ap else scores),
                *(row.sizes or (None, None, None)),
                *(cell.saved, "" if figure is None else " ".join(map(str, figure.sizes))),
                *((None, None) if also is None else (also.value, also.mark)),
            ]
        )
    return text.getvalue()


def latex(rows: Sequence[Row], title: str, notes: Sequence[str]) -> str:
    """A longtable; needs the packages booktabs and longtable."""
    lines = [cells(row) for row in rows]
    # What is open or missing is in the other forms.
    shown = [c for c in _used(lines) if _TITLES[c] not in ("status", "seconds")]
    columns = "".join("l" if c < _LEFT else "r" for c in shown)
    head = " & ".join(_escaped(_TITLES[c]) for c in shown) + r" \\"
    body, before = [], ""
    for row, line in zip(rows, lines, strict=True):
        block = f"{row.cell.boxes} {row.cell.model}"
        if before and block != before:
            body.append(r"\midrule")
        before = block
        body.append(" & ".join(_escaped(line[c]) for c in shown) + r" \\")
    parts = [
        r"% \usepackage{booktabs, longtable}",
        *(f"% {note}" for note in notes),
        rf"\begin{{longtable}}{{{columns}}}",
        rf"\caption{{{_escaped(' '.join([title + '.', *legend(rows)]))}}} \\",
        r"\toprule",
        head,
        r"\midrule",
        r"\endhead",
        *body,
        r"\bottomrule",
        r"\end{longtable}",
    ]
    return "\n".join(parts) + "\n"


def require_form(path: Path) -> None:
    """Refuse a file in whose form the table cannot be written.

    Raises:
        ConfigError: its name ends in something else than .md, .csv or .tex.
    """
    if path.suffix not in (".md", ".csv", ".tex"):
        raise ConfigError(
            f"asked to write the table to {path}: name it *.md, *.csv or *.tex, which is its form"
        )


def write(path: Path, rows: Sequence[Row], title: str, notes: Sequence[str]) -> None:
    """Write the table in the form that the file's name asks for.

    Raises:
        ConfigError: as `require_form`.
    """
    require_form(path)
    forms: dict[str, Callable[[], str]] = {
        ".md": lambda: markdown(rows, title, notes),
        ".csv": lambda: csv_text(rows),
        ".tex": lambda: latex(rows, title, notes),
    }
    write_text(forms[path.suffix](), path)


def _used(lines: Sequence[Sequence[str]]) -> list[int]:
    """Columns with an entry in some row."""
    return [c for c in range(len(_TITLES)) if any(line[c] for line in lines)]


def _number(value: float | None, signed: bool = False) -> str:
    if value is None:
        return ""
    return f"{value:+.1f}" if signed else f"{value:.1f}"


_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: rf"\{character}" for character in "&%$#_{}"},
}


def _escaped(text: str) -> str:
    return "".join(_SPECIAL.get(character, character) for character in text)
