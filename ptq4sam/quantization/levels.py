"""Levels: what the `units` of a scheme say of a unit, its bits or that it stays float."""

from __future__ import annotations

import re
from typing import Literal

from ptq4sam.records import FieldError

FLOAT: Literal["float"] = "float"
"""Instead of bits: a unit that stays as it is."""

_BOTH_BITS = re.compile(r"w(\d+)a(\d+)")

LEVELS = "2 to 16, both apart as w4a8, or float"


def bits_of_level(level: int | str) -> tuple[int, int] | None:
    """Bits of the weights and of the activations of a unit; None for one that stays float.

    Args:
        level: what a scheme's `units` says of it.

    Raises:
        FieldError: it is no level.
    """
    if isinstance(level, int):
        return level, level
    both = _BOTH_BITS.fullmatch(level)
    if both is not None:
        return int(both[1]), int(both[2])
    if level != FLOAT:
        raise FieldError("", f"{level!r} given, allowed: {LEVELS}")
    return None


def described_level(level: int | str) -> str:
    """What a scheme's `units` says of a unit, for people."""
    if isinstance(level, int):
        return f"at {level} bits"
    return level if level == FLOAT else f"at {level.upper()}"
