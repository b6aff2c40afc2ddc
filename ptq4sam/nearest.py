"""The known name that somebody meant who wrote another one, for messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that is most like another; None where none is.

    One that differs in case, hyphens and underscores alone goes before all others: of ptq4sam-s and
    ptq4sam-l, ptq4samL means the second.

    Args:
        name: what was written.
        known: what there is.
        cutoff: how alike names must be, from 0 to 1.
    """
    every = {one.lower(): one for one in known}
    same = {_letters(one): one for one in every.values()}
    if _letters(name) in same:
        return same[_letters(name)]
    close = difflib.get_close_matches(name.lower(), every, n=1, cutoff=cutoff)
    return every[close[0]] if close else None


def _letters(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
