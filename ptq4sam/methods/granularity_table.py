"""Points of an adaptive granularity as whole numbers, by shift and table."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.grids import PointGrid
from ptq4sam.quantization.published import TAUS
from ptq4sam.quantization.whole import EXACT, LARGEST_ROW

ENTRY_BITS = 24
"""Fraction bits of the table's entries: as many as a float32 has."""
MOST_BITS = 30
"""Fraction bits of points whose sums need float64."""
_ENOUGH_BITS = 15
"""Fraction bits with which float32 is used whatever the grid."""
_SPARE_BITS = 5
"""Bits that the smallest point must have at least, where there are fewer."""
_ROUNDING = 1e-5
"""How far a value may lie from its point, as a share of it."""


@dataclass(frozen=True)
class LogarithmicGrid(PointGrid):
    """Points scale * 2^(-code / tau), and zero.

    Attributes:
        codes: codes 0 to qmax are points; one above stands for zero.
        scale: float32 [], the largest point.
        tau: one of TAUS.
        fraction_bits: of whole points, in units of the scale.
    """

    codes: Grid
    scale: Tensor
    tau: int
    fraction_bits: int
    kind = "logarithmic"

    @property
    def step(self) -> Tensor:
        """What the last fraction bit is worth."""
        return self.scale * 2.0**-self.fraction_bits

    def whole_points(self) -> Tensor:
        """By shift and table."""
        return point_table(self.codes.levels, self.tau, self.fraction_bits).flip(0)

    def facts(self) -> dict[str, Any]:
        """Scale and granularity."""
        return {"scale": float(self.scale), "tau": self.tau}

    def points(self) -> Tensor:
        """Not rounded to fraction bits, as they are while something is learned."""
        codes = torch.arange(self.codes.levels, dtype=torch.float64, device="cpu").flip(0)
        powers = torch.exp2(-codes / self.tau) * float(self.scale)
        return torch.cat([powers.new_zeros(1), powers])

    def holds(self, x: Tensor, channel_axis: int | None = None) -> Tensor:
        """Within 1e-5 of themselves."""
        del channel_axis
        points = self.points().to(x)
        above = torch.searchsorted(points, x.contiguous()).clamp(max=len(points) - 1)
        near = (points[above], points[(above - 1).clamp(min=0)])
        close = [torch.isclose(point, x, rtol=_ROUNDING, atol=0) for point in near]
        return close[0] | close[1]


def fraction_bits(levels: int, tau: int, scale: float) -> int:
    """Bits after the point of whole points, in units of the scale.

    As many as keep the sums of points times values of as many levels exact in float32, at whatever
    number of keys. MOST_BITS where these would be too few; sums then need float64, which holds
    those over 2^13 keys at 8 bits.
    """
    bits = math.floor(math.log2(EXACT * scale / (LARGEST_ROW * (levels - 1))))
    wanted = min(_ENOUGH_BITS, (levels - 1) / tau + _SPARE_BITS)
    return min(bits, 22) if bits >= wanted else MOST_BITS


@functools.lru_cache(maxsize=256)
def point_table(levels: int, tau: int, bits: int) -> Tensor:
    """Points of codes 0 to `levels`, int64 with `bits` fraction bits, the last one 0.

    Code c stands for 2^(-c / tau) of the scale: entry c mod tau of a table of tau numbers
    2^(-r / tau), rounded to ENTRY_BITS fraction bits, shifted right by c div tau places and to
    `bits` fraction bits, half to even. Each point is a float32.

    The result is shared: do not change it.
    """
    table = [round(2 ** (ENTRY_BITS - r / tau)) << bits for r in range(tau)]
    points = [_shifted(table[code % tau], code // tau + ENTRY_BITS) for code in range(levels)]
    return torch.tensor([*points, 0], device="cpu")


@functools.cache
def code_middles(tau: int) -> Tensor:
    """Mantissas of float32 numbers from which on a number has the code before, int32 [max(TAUS)].

    In 2^e m the k-th of tau codes ends where m is 2^((2k + 1) / (2 tau)); these are irrational, so
    that no number lies in the middle. Those beyond tau are larger than any mantissa.

    The result is shared: do not change it.
    """
    one = 1 << 23
    found = [math.ceil(one * 2 ** ((2 * k + 1) / (2 * tau))) - one for k in range(tau)]
    ends = found + [one] * (max(TAUS) - tau)
    return torch.tensor(ends, dtype=torch.int32, device="cpu")


@functools.cache
def power_table(device: torch.device) -> tuple[Tensor, Tensor]:
    """For each granularity, where a mantissa counts as the next power of 2^(1 / tau), and that.

    In tensors, since whoever learns on a GPU must not wait for it to tell tau.

    Returns:
        `code_middles`, int32, and powers 2^((k + 1) / tau), float32, 0 for k beyond tau; both
        [max(TAUS) + 1, max(TAUS)] with a row for each tau. They are shared: do not change them.
    """
    middles = torch.stack([code_middles(max(1, tau)) for tau in range(max(TAUS) + 1)])
    powers = torch.zeros_like(middles, dtype=torch.float32)
    for tau in range(1, max(TAUS) + 1):
        powers[tau, :tau] = torch.exp2(
            torch.arange(1, tau + 1, dtype=torch.float64, device=powers.device) / tau
        )
    return middles.to(device), powers.to(device)


def _shifted(number: int, places: int) -> int:
    """The number / 2^places, half to even."""
    quotient, rest = divmod(number, 1 << places)
    double = 2 * rest
    return quotient + (double > 1 << places or (double == 1 << places and quotient % 2 == 1))
