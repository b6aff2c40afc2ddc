"""Whether a difference between two models is one: a paired bootstrap over pictures.

Mean IoU is a mean over objects, but objects of one picture hang together, and another sample of a
data set would have other pictures. So pictures are drawn anew, with replacement, each with all of
its objects in both models, and the difference of the two means is taken each time (Efron, 1979;
paired as in Koehn, 2004). Where the middle 95 % of those differences are on one side of zero, the
difference is more than the choice of pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS = 10_000
SHARE = 0.95
"""Of the draws, that lie between the ends of an interval."""
_ELEMENTS = 2**24
"""Of drawn pictures that are held at once."""


@dataclass(frozen=True)
class Difference:
    """Of two means over the same pictures.

    Attributes:
        value: the first less the second.
        low: lower end of the interval.
        high: upper end.
        pictures: how many.
    """

    value: float
    low: float
    high: float
    pictures: int

    @property
    def is_one(self) -> bool:
        """Whether the interval is on one side of zero."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        """In points, as `-1.2 (95 %: -2.0 to -0.5): a difference`."""
        numbers = [f"{100 * x:+.1f}" for x in (self.value, self.low, self.high)]
        kind = "a difference" if self.is_one else "no difference beyond the choice of pictures"
        return f"{numbers[0]} ({SHARE:.0%}: {numbers[1]} to {numbers[2]}): {kind}"


def paired_difference(
    first: Sequence[float],
    second: Sequence[float],
    counts: Sequence[int],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Difference:
    """Difference of two means over objects, with an interval by drawing pictures.

    Args:
        first: a model's mean of each picture.
        second: the other's, of the same pictures.
        counts: objects of each picture; those without any do not count.
        draws: how many samples.
        seed: of the draws.

    Raises:
        ValueError: the lengths differ, or no picture has objects.
    """
    weights = np.asarray(counts, dtype=np.float64)
    used = weights > 0
    if not len(first) == len(second) == len(weights) or not used.any():
        raise ValueError(
            f"means of {len(first)} and {len(second)} pictures with {len(counts)} counts, "
            f"{int(used.sum())} of them above 0: pairs of pictures with objects are needed"
        )
    weights = weights[used]
    totals = np.subtract(first, second)[used] * weights
    value = float(totals.sum() / weights.sum())
    found = _drawn(totals, weights, draws, np.random.default_rng(seed))
    tail = (1 - SHARE) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return Difference(value, float(low), float(high), len(weights))


def _drawn(
    totals: NDArray[np.float64],
    weights: NDArray[np.float64],
    draws: int,
    random: np.random.Generator,
) -> NDArray[np.float64]:
    """The difference of the means in each draw."""
    pictures = len(totals)
    at_once = max(1, _ELEMENTS // pictures)
    parts = []
    for first in range(0, draws, at_once):
        size = (min(at_once, draws - first), pictures)
        places = random.integers(pictures, size=size)
        parts.append(totals[places].sum(1) / weights[places].sum(1))
    return np.concatenate(parts)
