"""Pages that several calls of a tool write, a part each."""

from __future__ import annotations

import re


def with_part(old: str, top: str, part: str) -> str:
    """A page whose part of the same title is this one, or that ends with it.

    Args:
        old: the page as it was, or nothing.
        top: its title and what stands before the first part.
        part: begins with its title, "## ...".
    """
    _, *parts = re.split(r"^(?=## )", old, flags=re.MULTILINE)
    kept = {known.splitlines()[0]: known.strip() for known in (*parts, part)}
    return "\n\n".join([top.strip(), *kept.values()]) + "\n"
