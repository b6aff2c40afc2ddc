"""Points of the hybrid grid: powers of two up to a knee, even steps above (AHCPTQ, 2025, 3.2).

Above its lowest value m the grid has the points

    0, s / 2^(l - 1), ..., s / 2, s, s + d, ..., s + (u - 1) d

with l logarithmic and u even codes, l + u = 2^bits. Here all of them, and m, are whole multiples of
one step, of which there are at most 255 up to 6 bits: devices multiply bytes. So the knee s is k
times 2^(l - 1) steps, and d is n steps; the pair (k, n) whose ratio d / s is nearest is taken, and
the step is chosen so that the last point stays.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.grids import PointGrid
from ptq4sam.quantization.portable import LARGEST, Arithmetic, apart, at_least

MOST_LOG_CODES = 8
"""Below s / 2^7 lies less than half a step of a byte."""
BYTE = 255
DEVICE_BITS = 6
"""Bits up to which all points are bytes; more need more."""


def largest_step(bits: int) -> int:
    """Steps between the first and the last point, at most."""
    return BYTE if bits <= DEVICE_BITS else (1 << (bits + 4)) - 1


@dataclass(frozen=True)
class HybridCodes(Grid):
    """Codes in the order of the points, which lie further apart than those of an even grid."""

    @property
    def largest_step(self) -> int:
        """How many steps a point is away from zero at most."""
        return largest_step(self.bits)


def log_codes(bits: int, log_share: float, knee_rate: float) -> int:
    """How many codes are logarithmic.

    Args:
        bits: of a code.
        log_share: wanted share of the codes.
        knee_rate: the knee as a share of the range, which must be at least 2^(codes - 1) steps.
    """
    reached = 1 + math.floor(math.log2(max(1.0, knee_rate * largest_step(bits))))
    levels = 1 << bits
    return min(max(1, round(log_share * levels)), reached, MOST_LOG_CODES, levels - 2)


@functools.cache
def whole_pairs(bits: int, logarithmic: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """All that knee and even steps may be, as whole numbers of steps; on a device from then on.

    Returns:
        Knees, even steps, and ratios of even step and knee in ascending order: [n] float64 each.
    """
    last, octaves = largest_step(bits), 2 ** (logarithmic - 1)
    even = 2**bits - logarithmic - 1
    pairs: dict[float, tuple[int, int]] = {}
    for knee in range(octaves, last, octaves):
        for step in range(1, (last - knee) // even + 1):
            # Of one ratio the largest pair: a fine step leaves the lowest value where it is.
            pairs[step / knee] = (knee, step)
    ratios = sorted(pairs)
    whole = torch.tensor([pairs[ratio] for ratio in ratios], dtype=torch.float64, device=device)
    return whole[:, 0], whole[:, 1], torch.tensor(ratios, dtype=torch.float64, device=device)


X = TypeVar("X", bound=Arithmetic)


class HybridNumbers(NamedTuple):
    """Where the points are, float32: tensors [], or numbers for a graph (`as_numbers`).

    Attributes:
        step: what a whole number of 1 is worth.
        inverse: 1 / step.
        zero: steps between the lowest value and 0, whole.
        ends: [MOST_LOG_CODES] where each power of two begins, in steps; too large beyond the knee.
        jumps: [MOST_LOG_CODES] from the point before to it, in steps; 0 beyond the knee.
        knee: where the even part begins, in steps.
        even_step: distance of its points, in steps.
        inverse_even: 1 / even_step.
    """

    step: Any
    inverse: Any
    zero: Any
    ends: Any
    jumps: Any
    knee: Any
    even_step: Any
    inverse_even: Any

    def as_numbers(self) -> HybridNumbers:
        """The same as Python's numbers."""
        return HybridNumbers(*(part.tolist() for part in self))


def hybrid_numbers(
    knee: Tensor, even_scale: Tensor, minimum: Tensor, bits: int, logarithmic: int
) -> HybridNumbers:
    """Snap a knee and an even step, values above the lowest one, to whole multiples of a step.

    Nothing is read by the host, nor copied from it: learning on a GPU does this in every step.
    """
    knees, steps, ratios = whole_pairs(bits, logarithmic, knee.device)
    even = 2**bits - logarithmic - 1
    ratio = even_scale.double() / knee.double()
    nearest = (ratios - ratio).abs().argmin().reshape(1)
    whole_knee, even_step = (x.index_select(0, nearest)[0] for x in (knees, steps))
    reach = knee.double() + even * even_scale.double()
    step = (reach / (whole_knee + even * even_step)).float()
    # Learned scales may leave the lowest value out of reach: zero stays a byte.
    zero = (-minimum.double() / step.double()).round().clamp(max=largest_step(bits))
    # Powers of two as shares of the knee, and what each adds to the one before.
    octaves = torch.arange(1 - logarithmic, 1, dtype=torch.float64, device=knee.device)
    powers = torch.exp2(octaves) * whole_knee
    jumps = torch.cat([powers[:1], powers[1:] - powers[:-1]])
    beyond = MOST_LOG_CODES - logarithmic
    ends = F.pad(powers * math.sqrt(0.5), (0, beyond), value=LARGEST)
    parts = (zero, ends, F.pad(jumps, (0, beyond)), whole_knee, even_step, even_step.reciprocal())
    return HybridNumbers(step, step.double().reciprocal().float(), *(x.float() for x in parts))


def hybrid_steps(x: X, numbers: HybridNumbers, even: int, powers: int = MOST_LOG_CODES) -> X:
    """Steps above the lowest value of the points that numbers go to, whole.

    As published: in the logarithm below the knee, to the nearest above it. Numbers below the middle
    of the lowest octave go to the lowest value. Of operations that every runtime rounds alike
    (`quantization/portable.py`), so that an export gives the same codes.

    Args:
        x: float32.
        numbers: of tensors for a tensor, of Python's numbers for a graph.
        even: points above the knee.
        powers: how many of `ends` count.
    """
    n = numbers
    point: X
    above = apart(x * n.inverse) + n.zero
    point = at_least(above, n.ends[0]) * n.jumps[0]
    for octave in range(1, powers):
        point = point + at_least(above, n.ends[octave]) * n.jumps[octave]
    count: X = apart((above - n.knee) * n.inverse_even).round().clamp(min=0.0, max=float(even))
    result: X = point + apart(count * n.even_step)
    return result


@dataclass(frozen=True)
class HybridGrid(PointGrid):
    """Powers of two up to a knee, even steps above it.

    Attributes:
        codes: in ascending order of the points.
        numbers: where they are.
        logarithmic: how many codes are.
    """

    codes: Grid
    numbers: HybridNumbers
    logarithmic: int
    kind = "hybrid"

    @property
    def step(self) -> Tensor:
        """What a whole number of 1 is worth."""
        step: Tensor = self.numbers.step
        return step

    @property
    def even(self) -> int:
        """Points above the knee."""
        return self.codes.levels - self.logarithmic - 1

    @property
    def zero(self) -> int:
        """Steps between the lowest value and 0."""
        return int(self.numbers.zero)

    def from_lowest(self) -> Tensor:
        """Points as steps above the lowest value, int64 [levels]."""
        knee, even_step = int(self.numbers.knee), int(self.numbers.even_step)
        powers = [knee >> octave for octave in reversed(range(self.logarithmic))]
        even = [knee + count * even_step for count in range(1, self.even + 1)]
        return torch.tensor([0, *powers, *even], device="cpu")

    def whole_points(self) -> Tensor:
        """Steps from 0."""
        return self.from_lowest() - self.zero
