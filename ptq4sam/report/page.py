"""What a page is made of, and how it becomes one HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ptq4sam.errors import DependencyError
from ptq4sam.runs.record import PictureRecord

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Tile:
    """A number that matters.

    Attributes:
        label: what it is, with its unit.
        value: the number.
        note: what it is compared with.
    """

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Banner:
    """What a reader must know first; `kind` is "warning" or "note"."""

    text: str
    kind: str = "warning"


@dataclass(frozen=True)
class Table:
    """Cells under titles; the first `texts` columns are text, the others numbers."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1
    kind: str = field(default="table", init=False)


@dataclass(frozen=True)
class Plot:
    """An SVG drawing, what it says, and what it is of."""

    svg: str
    caption: str
    title: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Plots:
    """Drawings that belong together, folded away where `open` is False."""

    title: str
    plots: Sequence[Plot]
    open: bool = True
    kind: str = field(default="plots", init=False)


@dataclass(frozen=True)
class Pictures:
    """Pictures with masks, to be compared by a slider."""

    pictures: Sequence[PictureRecord]
    kind: str = field(default="pictures", init=False)


@dataclass(frozen=True)
class Text:
    """A paragraph, or, with a title, preformatted text that is folded away."""

    text: str
    title: str = ""
    kind: str = field(default="text", init=False)


Block = Table | Plots | Pictures | Text


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading."""

    id: str
    title: str
    blocks: Sequence[Block]
    intro: str = ""


@dataclass(frozen=True)
class Page:
    """All of it."""

    title: str
    subtitle: str
    sections: Sequence[Section]
    tiles: Sequence[Tile] = ()
    banners: Sequence[Banner] = ()


def render(page: Page) -> str:
    """The page as HTML with everything in it.

    Raises:
        DependencyError: Jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise missing("jinja2") from error

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    parts = {name: (_FOLDER / f"page.{name}").read_text(encoding="utf-8") for name in ("css", "js")}
    return environment.get_template("page.html.j2").render(page=page, **parts)


def missing(package: str) -> DependencyError:
    """The error for a package of the extra that is not there."""
    return DependencyError(
        f"ptq4sam report needs {package}, which is not installed: pip install 'ptq4sam[report]'"
    )
