"""Softmax outputs on points that are even in log(1 + a x) (LNQ of AHCQ-SAM, 2026).

With N = 2^bits - 1, a largest point s and a curvature a, code c stands for

    ((1 + a s)^(c / N) - 1) / a,

and an output goes to the code nearest in log(1 + a x). Towards a = 0 the points are even, for large
ones logarithmic. Published quantizers have N = 2^bits, one point more than there are codes. Here
points are also whole multiples of s / 255, as devices multiply bytes; those that would fall onto
each other, at small curvature only, are moved apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ptq4sam.errors import CalibrationError
from ptq4sam.methods.granularity_search import some_queries
from ptq4sam.quantization.base import Quantizer, Statistics
from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.grids import PointGrid
from ptq4sam.quantization.mse import nearly_powered
from ptq4sam.quantization.registry import GRIDS
from ptq4sam.records import FieldError, Record

BYTE = 255
MOST_BITS = 6
_FEW = 1024
"""Rows of attention on which curvatures are compared."""
_COARSE = 16
"""Largest points looked at for each curvature."""
_CLOSER = (1 / 32, 1 / 64)
"""Shares of the largest output by which the best of them is moved."""


@dataclass(frozen=True)
class Lnq(Record):
    """Settings.

    Attributes:
        curvatures: what the search chooses from.
    """

    curvatures: tuple[float, ...] = (0.001, 0.1, 1.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0)

    def _validate(self) -> None:
        good = len(self.curvatures) > 0 and all(0 < a <= 1e6 for a in self.curvatures)
        self._require(good, "curvatures", "some above 0, up to 1e6")


def points_and_ends(bits: int, curvature: float, largest: float) -> tuple[list[int], list[float]]:
    """Whole points of all codes, and where each code but the first begins.

    Args:
        bits: of a code.
        curvature: a.
        largest: s.
    """
    last = 2**bits - 1
    base = math.log1p(curvature * largest)

    def at(code: float) -> float:
        return math.expm1(base * code / last) / curvature

    points = [0]
    for code in range(1, last + 1):
        # Room for the points above.
        whole = min(round(at(code) / largest * BYTE), BYTE - last + code)
        points.append(max(whole, points[-1] + 1))
    return points, [at(code + 0.5) for code in range(last)]


@dataclass(frozen=True)
class TableGrid(PointGrid):
    """Points as they stand in a table.

    Attributes:
        codes: in ascending order of the points.
        whole: [levels] points as whole numbers of steps.
        ends_of_codes: [levels - 1] the smallest number of each code but the first, float32.
        unit: [] what a step is worth.
    """

    codes: Grid
    whole: Tensor
    ends_of_codes: Tensor
    unit: Tensor
    kind = "table"

    @property
    def step(self) -> Tensor:
        """What a whole number of 1 is worth."""
        return self.unit

    def whole_points(self) -> Tensor:
        """As they stand."""
        return self.whole.to(torch.int64)


@dataclass(frozen=True)
class ByteCodes(Grid):
    """Codes of points that are bytes."""

    @property
    def largest_step(self) -> int:
        """How many steps a point is away from zero at most."""
        return BYTE


@GRIDS.register("lnq")
class LnqQuantizer(Quantizer):
    """Points even in log(1 + a x), for softmax outputs; nothing of it is learned.

    Args:
        grid: its bits give the number of points.
        settings: what the search chooses from.

    Attributes:
        scale: [] what a step is worth.
        points: [levels] whole numbers of steps.
        ends: [levels - 1] the smallest number of each code but the first.
    """

    settings_type = Lnq
    slots = ("softmax",)
    points: Tensor
    ends: Tensor

    def __init__(self, grid: Grid, settings: Lnq | None = None) -> None:
        super().__init__(ByteCodes(grid.bits))
        if grid.bits > MOST_BITS:
            raise FieldError("bit", f"{grid.bits} given, a grid lnq has up to {MOST_BITS}")
        self._curvatures = (Lnq() if settings is None else settings).curvatures
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("points", torch.zeros(grid.levels))
        self.register_buffer("ends", torch.zeros(grid.levels - 1))
        self._batches = 0
        self._largest = [0.0] * len(self._curvatures)
        self._errors = [0.0] * len(self._curvatures)

    @classmethod
    def of_settings(cls, grid: Grid, settings: Record) -> LnqQuantizer:
        """See Quantizer."""
        return cls(grid, cast(Lnq, settings))

    def derived(self) -> dict[str, Tensor]:
        """No zero point."""
        return {**super().derived(), "zero_point": torch.zeros((), device="cpu")}

    def grid_problems(self) -> Iterator[str]:
        """Points that are no bytes, not in their order, or not one for each code."""
        points, ends, levels = self.points, self.ends, self.grid.levels
        if (points.numel(), ends.numel()) != (levels, levels - 1):
            yield f"has {points.numel()} points and {ends.numel()} ends for {levels} codes"
            return
        if not bool((ends > 0).all() & (ends.diff() >= 0).all() & ends.isfinite().all()):
            yield "has ends of codes that are not ascending numbers above 0"
        whole = bool((points == points.round()).all()) and float(points[-1]) <= BYTE
        if not (whole and float(points[0]) == 0 and bool((points.diff() > 0).all())):
            yield f"has points that are not ascending whole numbers from 0 to {BYTE}"

    def grid_in_use(self) -> TableGrid:
        """Its points; see Quantizer."""
        self._require_calibration()
        return TableGrid(self.grid, self.points, self.ends, self.scale)

    def batch_statistics(self, x: Tensor, value: Tensor | None) -> Statistics:
        """Search a largest point for each curvature.

        Args:
            x: [..., n, m] softmax output.
            value: [..., m, channels] what it is multiplied with.

        Returns:
            Best largest points and their errors, one for each curvature, float64.

        Raises:
            CalibrationError: no value was given, or an attention that is negative or all zero.
        """
        low, high = (float(end) for end in torch.aminmax(x))
        if value is None or low < 0 or high == 0:
            raise CalibrationError(
                f"softmax outputs and values were expected, found numbers from {low:.3g} to "
                f"{high:.3g}{'' if value is not None else ' without values'}: use another grid here"
            )
        rows = x[..., 0].numel()
        some = some_queries(x, max(1, rows // _FEW), few=2 * _FEW).detach()
        exact = some @ value
        found = [self._least(some, value, exact, curvature, high) for curvature in self._curvatures]
        largest, errors = zip(*found, strict=True)
        return _doubles(largest), _doubles(errors)

    def _least(
        self, x: Tensor, value: Tensor, exact: Tensor, curvature: float, high: float
    ) -> tuple[float, float]:
        """The best largest point up to the largest output, and its error."""

        def error(largest: float) -> float:
            points, ends, unit = self._table(curvature, largest, x)
            moved = points[torch.bucketize(x, ends, right=True)] * unit
            return float(nearly_powered(moved @ value - exact).mean(dtype=torch.float64))

        # From a tenth of the largest output on, as published.
        errors = {}
        for place in range(1, _COARSE + 1):
            largest = high * (0.1 + 0.9 * place / _COARSE)
            errors[largest] = error(largest)
        for share in _CLOSER:
            best = min(errors, key=lambda largest: errors[largest])
            for beside in (best - share * high, min(high, best + share * high)):
                errors[beside] = errors.get(beside, error(beside))
        best = min(errors, key=lambda largest: errors[largest])
        return best, errors[best]

    def merge(self, statistics: Statistics) -> None:
        """Set the curvature of the least error over all batches, and its mean largest point."""
        largest, errors = (found.tolist() for found in statistics)
        self._batches += 1
        self._largest = [a + b for a, b in zip(self._largest, largest, strict=True)]
        self._errors = [a + b for a, b in zip(self._errors, errors, strict=True)]
        best = self._errors.index(min(self._errors))
        curvature, mean = self._curvatures[best], self._largest[best] / self._batches
        self.points, self.ends, unit = self._table(curvature, mean, self.points)
        self._set_parameters(unit, self.zero_point)

    def _table(self, curvature: float, largest: float, like: Tensor) -> tuple[Tensor, ...]:
        """Points, ends and step, float32."""
        points, ends = points_and_ends(self.grid.bits, curvature, largest)
        lists = (points, ends, largest / BYTE)
        return tuple(torch.tensor(x, dtype=torch.float32, device=like.device) for x in lists)

    def quantize(self, x: Tensor) -> Tensor:
        """Move `x` to its points; gradients go straight through up to the largest one."""
        whole = self.points[torch.bucketize(x.detach().float(), self.ends, right=True)]
        moved = (whole * self.scale + (x.detach() - x.detach())).to(x.dtype)
        if not torch.is_grad_enabled():
            return moved
        within = torch.minimum(x, (self.points[-1] * self.scale).to(x.dtype))
        return within + (moved - within).detach()

    @torch.no_grad()
    def steps(self, x: Tensor) -> Tensor:
        """Points as whole numbers."""
        x = x.float()
        # What is not a number stays so, to be found.
        return self.points[torch.bucketize(x, self.ends, right=True)] + (x - x)

    @property
    def step(self) -> Tensor:
        """What a whole number of 1 is worth."""
        self._require_calibration()
        return self.scale

    @property
    def step_bounds(self) -> tuple[int, int]:
        """From 0."""
        return 0, BYTE

    @property
    def largest_row(self) -> float:
        """As many times 1 as a point is its smallest output: near zero points are moved up."""
        return float((self.points[1:] * self.step / self.ends).max())

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Codes of `x`, int32."""
        self._require_calibration()
        return torch.bucketize(x.float(), self.ends, right=True).to(torch.int32)


def _doubles(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")
