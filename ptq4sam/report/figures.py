"""Drawings as SVG: matplotlib's, made to fit into a page and its colours, light or dark.

SVG of matplotlib needs no script and 4 to 10 kB each; plotly's script alone is 4.8 MB in every
file, for zooming that these drawings do not need.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ptq4sam.report.page import missing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FLOAT, QUANTIZED, THIRD = "#4a90d9", "#e8833a", "#3aa981"
"""Of the float model, of the quantized one, and of what is neither; seen on light and on dark."""
INK = "#010203"
"""Becomes the page's own colour of text."""
_SOFT = 0.35
_WIDTH, _HEIGHT = 4.2, 2.35
_LETTERS = 56
"""Of a line over a drawing."""


def axes(
    x_label: str,
    y_label: str,
    rows: int = 1,
    width: float = _WIDTH,
    height: float = _HEIGHT,
    left: float = 0.62,
) -> tuple[Figure, list[Axes]]:
    """A figure with rows of axes that share x; sizes in inches, `left` of the left margin.

    Raises:
        DependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing("matplotlib") from error
    figure = Figure(figsize=(width, height))
    all_axes: list[Axes] = []
    for row in range(rows):
        all_axes.append(
            figure.add_subplot(rows, 1, row + 1, sharex=all_axes[0] if all_axes else None)
        )
    figure.subplots_adjust(
        left=left / width,
        right=1 - 0.12 / width,
        top=1 - (0.12 if rows == 1 else 0.24) / height,
        bottom=0.5 / height,
        hspace=0.3,
    )
    for one in all_axes:
        one.set_facecolor("none")
        one.tick_params(colors=INK, labelsize=8.5, width=0.6)
        one.set_ylabel(y_label, color=INK, fontsize=8.5)
        for side, spine in one.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(INK)
            spine.set_linewidth(0.6)
        if one is not all_axes[-1]:
            one.tick_params(labelbottom=False)
    all_axes[-1].set_xlabel(x_label, color=INK, fontsize=8.5)
    return figure, all_axes


def logarithmic_y(one: Axes) -> None:
    """Make an axis of values logarithmic; its numbers are plain, since typeset ones take long."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            # Empty where there is no room.
            shown = super().__call__(x, pos)
            return (f"{x:g}" if x >= 0.01 else f"{x:.0e}".replace("e-0", "e-")) if shown else ""

    one.set_yscale("log")
    one.yaxis.set_major_formatter(Plain())
    one.yaxis.set_minor_formatter(Plain(labelOnlyBase=False))
    one.tick_params(which="minor", colors=INK, labelsize=8.5)


def svg(figure: Figure, label: str) -> str:
    """The figure as an SVG element.

    Args:
        figure: drawn with INK where the page's colour of text belongs.
        label: what it shows, for who cannot see it; another one for each drawing of a page.
    """
    import matplotlib as mpl

    written = io.StringIO()
    # Ids in the page differ as labels do.
    settings = {"svg.fonttype": "none", "svg.hashsalt": label}
    with mpl.rc_context(settings):
        figure.savefig(written, format="svg", facecolor="none", metadata={"Date": None})
    text = written.getvalue()
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text).groups()  # type: ignore[union-attr]
    inner = text[text.index("</metadata>") + len("</metadata>") : text.rindex("</svg>")]
    inner = re.sub(r'<style type="text/css">.*?</style>', "", inner, flags=re.DOTALL)
    inner = re.sub(r"<!--.*?-->", "", inner, flags=re.DOTALL)
    inner = re.sub(r'<g id="[^"]*"', "<g", inner)
    # A hundredth of a point is less than is seen; texts between the tags stay.
    inner = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), inner)
    inner = re.sub(r"\s*\n\s*", " ", inner).replace(INK, "currentColor")
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(label)}">'
        f"{inner}</svg>"
    )


def title(one: Axes, text: str) -> None:
    """What one of several rows shows, above it."""
    one.set_title(text, loc="right", fontsize=8.5, color=INK, pad=2)


def legend(one: Axes, place: str = "upper right") -> None:
    """Names of what was drawn."""
    one.legend(fontsize=8, frameon=False, labelcolor=INK, loc=place, handlelength=1.2)


def legend_above(figure: Figure, titles: Sequence[str]) -> None:
    """Names of what was drawn over the axes, for which the figure becomes higher.

    Side by side where they fit, else under each other.
    """
    columns = len(titles) if sum(map(len, titles)) + 6 * len(titles) < _LETTERS else 1
    room = 0.1 + 0.19 * (len(titles) // columns)
    width, height = figure.get_size_inches()
    bottom, top = figure.subplotpars.bottom * height, (1 - figure.subplotpars.top) * height
    figure.set_size_inches(width, height + room)
    figure.subplots_adjust(bottom=bottom / (height + room), top=1 - (top + room) / (height + room))
    figure.legend(
        fontsize=8,
        frameon=False,
        labelcolor=INK,
        loc="upper left",
        ncols=columns,
        handlelength=1.4,
        borderpad=0.2,
    )


def histogram(one: Axes, low: float, high: float, heights: Sequence[float], colour: str) -> None:
    """Bars of equal width between two ends, as one shape."""
    width = (high - low) / len(heights)
    edges = [low + width * index for index in range(len(heights) + 1)]
    one.stairs(heights, edges, fill=True, color=colour, alpha=_SOFT + 0.2, linewidth=0)


def whole_numbers(one: Axes) -> None:
    """No fractions along y, where things are counted."""
    from matplotlib.ticker import MaxNLocator

    one.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def span(one: Axes, low: float, high: float, horizontal: bool = False) -> None:
    """Dashed lines at the ends of a range."""
    line = one.axhline if horizontal else one.axvline
    for end in (low, high):
        line(end, color=INK, linewidth=0.9, linestyle=(0, (3, 2)))


def bars(
    names: Sequence[str],
    series: Sequence[tuple[str, str, Sequence[float]]],
    x_label: str,
    label: str,
    errors: Sequence[Sequence[float]] | None = None,
    logarithmic: bool = False,
    numbers: str = "",
) -> str:
    """Horizontal bars, a group a name, the first on top.

    Args:
        names: of the groups.
        series: title, colour and values, one a group.
        x_label: what the bars measure, with its unit.
        label: what the drawing shows.
        errors: half a length of each error bar, by series.
        logarithmic: scale of the values.
        numbers: format that values are written with at the bars' ends; "" for not at all.
    """
    thick = 0.8 / len(series)
    longest = max(map(len, names))
    left = min(2.6, 0.25 + 0.072 * longest)
    height = 0.72 + 0.3 * len(names) * max(1.0, 0.6 * len(series))
    figure, (one,) = axes(x_label, "", width=max(_WIDTH, left + 2.6), height=height, left=left)
    for index, (title, colour, values) in enumerate(series):
        places = [row + (index - (len(series) - 1) / 2) * thick for row in range(len(names))]
        spread = None if errors is None else errors[index]
        drawn = one.barh(
            places,
            values,
            height=thick * 0.92,
            color=colour,
            label=title,
            xerr=spread,
            error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 2},
            log=logarithmic,
        )
        if numbers:
            texts = [numbers.format(value) for value in values]
            one.bar_label(drawn, texts, fontsize=8, color=INK, padding=2)
    one.set_yticks(range(len(names)), names)
    one.set_ylim(len(names) - 0.4, -0.6)
    one.tick_params(axis="y", length=0)
    one.spines["left"].set_visible(False)
    if numbers:
        one.margins(x=0.16)
    if not logarithmic:
        one.axvline(0, color=INK, linewidth=0.6)
    if len(series) > 1:
        legend_above(figure, [title for title, _, _ in series])
    return svg(figure, label)
