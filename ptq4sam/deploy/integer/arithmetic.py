"""Integer arithmetic of quantized operators: products of codes, and back to codes.

Numbers of SAM's operators, at 8 bits or fewer:

- A sum of K products of codes below 2^8, corrected for two zero points, is made of four terms below
  K * 2^16 each, so that every partial result stays below K * 2^18: within int32 for K <= 8191.
  SAM's longest sums have 5120 (second MLP layer of ViT-H) and 4096 terms (keys of a global
  attention at 1024 px).
- Softmax outputs under adaptive granularity are numbers of FRACTION_BITS bits, whose sums need
  int64; see `GranularityTable`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ptq4sam.deploy.codes import LogGrid, UniformGrid
from ptq4sam.errors import DeployError

MOST_BITS = 8
"""Bits of the widest codes."""
LONGEST_SUM = 8191
"""Terms of the longest int32 sum of products of two codes."""
FRACTION_BITS = 30
"""Fraction bits of the points of an adaptive granularity."""
SUM_FRACTION_BITS = 16
"""Fraction bits that their sums are rounded to."""

_MOST_SHIFT = 45
_OFFSET_BITS = 60


def require_narrow(name: str, *grids: UniformGrid | LogGrid, terms: int = 0) -> None:
    """Refuse what int32 sums cannot hold.

    Raises:
        DeployError: codes are wider than 8 bits, or a sum has too many terms.
    """
    bits = max(grid.grid.bits for grid in grids)
    if bits > MOST_BITS or terms > LONGEST_SUM:
        raise DeployError(
            f"{name} has codes of {bits} bits and sums of {terms} products: integer arithmetic in "
            f"32 bits holds {MOST_BITS} bits and {LONGEST_SUM} products"
        )


def affine_product(
    a: Tensor, b: Tensor, a_zero: Tensor | int, b_zero: Tensor | int, dtype: torch.dtype
) -> Tensor:
    """Sum over k of (a - a_zero) (b - b_zero), from the product of the codes alone.

    sum a b - b_zero sum a - a_zero sum b + K a_zero b_zero: hardware multiplies codes as they are
    stored, and corrects the sums.

    Args:
        a: integer codes [..., m, K].
        b: integer codes [..., K, n].
        a_zero: zero point, a number or [m, 1].
        b_zero: zero point, a number or [n].
        dtype: of the accumulator, int32 or int64; it must hold the sums.

    Returns:
        [..., m, n] in `dtype`, exact.
    """
    result = _exact_product(a, b).to(dtype)
    sums_a = a.sum(-1, keepdim=True, dtype=dtype)
    sums_b = b.sum(-2, keepdim=True, dtype=dtype)
    result -= sums_a * b_zero
    result -= sums_b * a_zero
    return result.add_(a.shape[-1] * a_zero * b_zero)


def _exact_product(a: Tensor, b: Tensor) -> Tensor:
    """A product of integers in float64, which is exact while sums stay below 2^53.

    All partial sums are whole numbers that float64 has, so that their order does not matter. torch
    has no fast product of integers for all shapes, and float32 may be set to bfloat16 or TF32.
    """
    return a.to(torch.float64) @ b.to(torch.float64)


class Requantizer(nn.Module):
    """From accumulators to the codes of an output grid, in integers.

    code = clamp(round(accumulator * factor + offset) + zero point), with factor and offset as
    fixed-point numbers of n fraction bits, n for each channel (Jacob et al., 2018, section 2.2,
    with the bias in the wide sum instead of the accumulator, where its rounding would cost up to
    half an accumulator unit): (accumulator * multiplier + offset) >> n, rounded half to even.
    Nothing leaves 64 bits: accumulator and multiplier have 62 together, the offset 60. A multiplier
    of 31 bits differs from its factor by 2^-31 of it at most, one of 24 bits by 2^-24, as float32.

    Args:
        factor: [channels] or [], what an accumulator of 1 is worth in output steps, float64.
        offset: that shape, in output steps (bias / output scale); None for 0.
        grids: the output grids; several share the channels equally.
        accumulator_bits: bits of the largest accumulator, without sign.
        name: of the operator, for messages.

    Raises:
        DeployError: the output grid is so fine that its codes mean nothing.
    """

    multiplier: Tensor
    fixed_offset: Tensor
    shift: Tensor
    zero_point: Tensor
    lowest: Tensor
    highest: Tensor

    def __init__(
        self,
        factor: Tensor,
        offset: Tensor | None,
        grids: Sequence[UniformGrid],
        accumulator_bits: int = 31,
        name: str = "",
    ) -> None:
        super().__init__()
        bits = min(31, 62 - accumulator_bits)
        shift = (bits - 1 - torch.floor(torch.log2(factor))).clamp(max=_MOST_SHIFT)
        offset = torch.zeros_like(factor) if offset is None else offset
        room = _OFFSET_BITS - torch.ceil(torch.log2(offset.abs().clamp(min=1)))
        shift = torch.minimum(shift, room)
        if bool((shift < 1).any()):
            raise DeployError(
                f"the output of {name} is up to 2^{bits} steps of its grid an accumulator unit: "
                "calibrate the model again"
            )
        self.register_buffer("multiplier", torch.round(factor * 2**shift).long())
        self.register_buffer("fixed_offset", torch.round(offset * 2**shift).long())
        self.register_buffer("shift", shift.long())
        each = factor.numel() // len(grids)

        def spread(values: list[int]) -> Tensor:
            found = torch.tensor(values, dtype=torch.int64)
            return found.repeat_interleave(each) if factor.dim() else found[0]

        self.register_buffer("zero_point", spread([grid.zero_point for grid in grids]))
        self.register_buffer("lowest", spread([grid.grid.qmin for grid in grids]))
        self.register_buffer("highest", spread([grid.grid.qmax for grid in grids]))

    def forward(self, accumulator: Tensor) -> Tensor:
        """Codes, int32, of accumulators [..., channels]."""
        wide = accumulator.long() * self.multiplier + self.fixed_offset
        codes = shift_right(wide, self.shift) + self.zero_point
        return codes.clamp(self.lowest, self.highest).to(torch.int32)


def shift_right(x: Tensor, places: Tensor | int) -> Tensor:
    """X / 2^places of int64 numbers, rounded half to even; places >= 1."""
    quotient = x >> places
    rest = x - (quotient << places)
    half = torch.ones_like(rest) << (places - 1)
    up = (rest > half) | ((rest == half) & (quotient & 1).bool())
    return quotient + up


class GranularityTable(nn.Module):
    """Points of an adaptive granularity as fixed-point numbers, by shift and table.

    Code c stands for 2^(-c / tau) of the scale: entry c mod tau of a table of tau numbers
    2^(-r / tau), rounded to FRACTION_BITS = 30 fraction bits, shifted right by c div tau places
    (half to even). A code beyond the grid is 0.

    Error: the table entry is off by half a unit 2^-30 at most, so the shifted number by 2^-32 and
    another half unit of the shift: 0.75 * 2^-30 in all, and 0 for tau = 1 down to 2^-30. A sum over
    N keys with values |v - z| <= 255 is off by 0.75 * 255 * N * 2^-30 <= 7.3e-4 for N = 4096, in
    units of scale times value scale.

    Accumulator: sums stay below N * 2^30 * 2^8, 2^50 for N = 4096, in int64 (and exact in float64,
    which holds 2^53: N <= 32,768). They are rounded to SUM_FRACTION_BITS = 16 fraction bits, 2^36,
    before they are multiplied by a multiplier of 24 bits.

    Args:
        grid: tau and number of points.
    """

    points: Tensor

    def __init__(self, grid: LogGrid) -> None:
        super().__init__()
        table = [round(2 ** (FRACTION_BITS - r / grid.tau)) for r in range(grid.tau)]
        codes = torch.arange(grid.grid.levels)
        entries = torch.tensor(table)[codes % grid.tau]
        places = (codes // grid.tau).clamp(max=FRACTION_BITS + 2)
        shifted = torch.where(places > 0, shift_right(entries, places.clamp(min=1)), entries)
        self.register_buffer("points", torch.cat([shifted, torch.zeros(1, dtype=torch.int64)]))

    def forward(self, codes: Tensor) -> Tensor:
        """Points, int64 with FRACTION_BITS fraction bits, of codes 0 to 2^bits."""
        return self.points[codes.long()]


SUM_BITS = SUM_FRACTION_BITS + math.ceil(math.log2(LONGEST_SUM)) + MOST_BITS + 1
"""Bits of a rounded sum of such points times values, whose longest one has LONGEST_SUM terms.

One bit more than the product needs, for points that rounded up.
"""


def round_sum(accumulator: Tensor) -> Tensor:
    """Sums of FRACTION_BITS fraction bits rounded to SUM_FRACTION_BITS."""
    return shift_right(accumulator, FRACTION_BITS - SUM_FRACTION_BITS)
