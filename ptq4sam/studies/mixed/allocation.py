"""The choice of one option for each unit as an integer program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp


@dataclass(frozen=True)
class Option:
    """One way to quantize a unit.

    Attributes:
        level: what a scheme's `units` would say.
        error: what it costs the masks; errors of units add up.
        prices: what it takes of each budget.
    """

    level: str
    error: float
    prices: tuple[int, ...]


def allocate(units: Mapping[str, Sequence[Option]], limits: Sequence[int]) -> dict[str, Option]:
    """The options of least total error that keep all limits.

    Args:
        units: what is possible for each unit.
        limits: of the sum of each price.

    Returns:
        An option for each unit.

    Raises:
        ValueError: no choice keeps the limits.
    """
    options = [option for those in units.values() for option in those]
    errors = np.array([option.error for option in options])
    prices = np.array([option.prices for option in options], np.float64).T
    one_each = np.zeros((len(units), len(options)))
    place = 0
    for row, those in enumerate(units.values()):
        one_each[row, place : place + len(those)] = 1
        place += len(those)
    allowed = np.array(limits, np.float64)
    while True:
        # Scaled, since the solver's tolerances are absolute.
        found = milp(
            errors / max(errors.max(), 1e-300),
            integrality=np.ones(len(options), np.int64),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(prices / np.array(limits)[:, None], ub=allowed / limits),
            ],
            options={"mip_rel_gap": 0},
        )
        if found.x is None:
            raise ValueError(f"no choice of options keeps {limits}: {found.message}")
        taken = [option for option, share in zip(options, found.x, strict=True) if share > 0.5]
        totals = [sum(option.prices[place] for option in taken) for place in range(len(limits))]
        excess = [max(0, total - limit) for total, limit in zip(totals, limits, strict=True)]
        if not any(excess):
            return dict(zip(units, taken, strict=True))
        # Within the solver's tolerance, a millionth, but not within the limit.
        allowed = allowed - excess
