"""Adaptive granularity quantization of softmax outputs (PTQ4SAM, Lv et al. 2024, section 3.3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ptq4sam.errors import CalibrationError
from ptq4sam.methods.granularity_points import (
    PointParameters,
    clamped_codes,
    point_parameters,
    quantize_points,
    whole_points,
)
from ptq4sam.methods.granularity_search import ScaleSearch, least_error, some_queries
from ptq4sam.methods.granularity_table import (
    MOST_BITS,
    LogarithmicGrid,
    code_middles,
    fraction_bits,
)
from ptq4sam.quantization.base import Statistics
from ptq4sam.quantization.dropping import Choice
from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.memo import Memo
from ptq4sam.quantization.published import TAUS, AdaptiveGranularity
from ptq4sam.quantization.quantizers import EPS, Quantizer
from ptq4sam.quantization.registry import GRIDS
from ptq4sam.records import Record

_TOLERANCE = 1e-3
"""Where a search that is not exact stops, as a share of the largest attention."""
_EXACT_TOLERANCE = 1e-5
"""Where an exact one stops: scipy's own."""


@dataclass(frozen=True)
class _Whole:
    """What whole numbers of steps need of scale and tau.

    Attributes:
        bits: after the point, in units of the scale.
        points: for kernels.
        unit: [] what the scale is in steps, of the type of steps.
        step: [] what a step is worth.
    """

    bits: int
    points: PointParameters
    unit: Tensor
    step: Tensor


@GRIDS.register("logarithmic")
class AdaptiveGranularityQuantizer(Quantizer):
    """Points s * 2^(-code / tau) for code 0 .. 2^bits - 1, and zero.

    Calibration chooses tau and s so that the product with the values changes least. In integers
    2^(-code / tau) is a shift by code div tau of one of tau table entries, that of code mod tau.

    Args:
        grid: its bits give the number of points.
        exact: search as published, each granularity on all queries to scipy's own tolerance. Else
            granularities are compared on an eighth of the queries, and the scale of the chosen one
            is searched on all of them to a thousandth of the largest attention: a third of the
            work, for the same granularity and a scale within 2 %.
        taus: granularities to choose from.
        search: see AdaptiveGranularity.

    Attributes:
        tau: [] one of TAUS.
        scale: [] largest point, learned.
    """

    settings_type = AdaptiveGranularity
    slots = ("softmax",)
    scale: nn.Parameter
    tau: Tensor

    def __init__(
        self,
        grid: Grid,
        exact: bool = True,
        taus: Sequence[int] = TAUS,
        search: Literal["bounded", "grid"] = "bounded",
    ) -> None:
        super().__init__(grid)
        self._search = search
        self._exact = exact
        self._taus = tuple(taus)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("tau", torch.ones(()))
        self._whole: Memo[_Whole] = Memo()
        self._batches = 0
        self._scale_sums = [0.0] * len(self._taus)
        self._error_sums = [0.0] * len(self._taus)

    @classmethod
    def of_settings(cls, grid: Grid, settings: Record) -> AdaptiveGranularityQuantizer:
        """See Quantizer."""
        chosen = cast(AdaptiveGranularity, settings)
        return cls(grid, chosen.exact, chosen.taus, chosen.search)

    def learned(self) -> list[nn.Parameter]:
        """The scale."""
        return [self.scale]

    def grid_in_use(self) -> LogarithmicGrid:
        """Its points; see Quantizer."""
        return LogarithmicGrid(self.grid, self.scale_in_use(), int(self.tau), self._of_steps().bits)

    def grid_problems(self) -> Iterator[str]:
        """A granularity that there is not."""
        if float(self.tau) not in TAUS:
            allowed = ", ".join(map(str, TAUS))
            yield f"has the granularity {float(self.tau):g}, expected one of {allowed}"

    def unlike(self, other: Quantizer) -> Iterator[tuple[str, str]]:
        """A granularity that the other may not choose, too."""
        yield from super().unlike(other)
        if isinstance(other, AdaptiveGranularityQuantizer) and float(self.tau) not in other._taus:
            allowed = ", ".join(map(str, other._taus))
            yield f"has the granularity {float(self.tau):g}", f"one of {allowed}"

    def derived(self) -> dict[str, Tensor]:
        """No zero point."""
        return {**super().derived(), "zero_point": torch.zeros((), device="cpu")}

    @property
    def tau_scales(self) -> list[float]:
        """Mean best scale of each tau over the batches observed."""
        return [total / max(1, self._batches) for total in self._scale_sums]

    @property
    def tau_errors(self) -> list[float]:
        """Sum of the least errors of each tau over the batches observed."""
        return list(self._error_sums)

    def batch_statistics(self, x: Tensor, value: Tensor | None) -> Statistics:
        """Search a scale for each tau.

        Args:
            x: [..., n, m] softmax output.
            value: [..., m, channels] what it is multiplied with.

        Returns:
            Best scales and their errors, one for each tau, float64.

        Raises:
            CalibrationError: no value was given, or an attention that is negative or all zero.
        """
        if value is None:
            raise CalibrationError(
                "its search weighs errors by the values, none were given: call it with "
                "(attention, value)"
            )
        low, high = torch.aminmax(x)
        if float(low) < 0 or float(high) == 0:
            raise CalibrationError(
                f"softmax outputs were expected, found values from {float(low):.3g} to "
                f"{float(high):.3g}: use another quantizer here"
            )
        levels, largest = self.grid.levels, float(high)
        if self._search == "grid":
            return tuple(map(_doubles, least_error(x, value, levels, self._taus)))
        tolerance = _EXACT_TOLERANCE if self._exact else _TOLERANCE * largest
        # Where there is nothing to choose there is nothing to compare either.
        compared = x if self._exact or len(self._taus) == 1 else some_queries(x)
        search = ScaleSearch(compared, value, levels, tolerance, self._exact)
        scales, errors = zip(*(search.best_scale(tau, largest) for tau in self._taus), strict=True)
        if compared is x:
            return _doubles(scales), _doubles(errors)
        best = errors.index(min(errors))
        whole = ScaleSearch(x, value, levels, tolerance, exact=False)
        scale, _ = whole.best_scale(self._taus[best], largest)
        return _doubles((*scales[:best], scale, *scales[best + 1 :])), _doubles(errors)

    def merge(self, statistics: Statistics) -> None:
        """Set the tau of the least error over all batches, and its mean scale."""
        scales, errors = (found.tolist() for found in statistics)
        self._scale_sums = [a + b for a, b in zip(self._scale_sums, scales, strict=True)]
        self._error_sums = [a + b for a, b in zip(self._error_sums, errors, strict=True)]
        self._batches += 1
        best = self._error_sums.index(min(self._error_sums))
        self.tau.fill_(self._taus[best])
        self._set_parameters(self.scale.new_tensor(self.tau_scales[best]), self.zero_point)
        self.constrain_()

    def quantize(self, x: Tensor) -> Tensor:
        """Move `x` to the nearest point in the logarithm; points below the last give zero."""
        return self._quantize(x, None)

    def quantize_some(self, x: Tensor, choice: Choice) -> Tensor:
        """Move `x` to its points, but for the elements that stay float (QDrop)."""
        return self._quantize(x, choice)

    def _quantize(self, x: Tensor, choice: Choice | None) -> Tensor:
        self._whole.clear()
        scale = self._positive_scale()
        points = point_parameters(scale, self.tau, self.grid.levels)
        return quantize_points(x, points, choice)

    @torch.no_grad()
    def scale_in_use(self) -> Tensor:
        """The scale that it quantizes with, [], positive.

        Raises:
            CalibrationError: the quantizer was not calibrated.
        """
        self._require_calibration()
        return self._positive_scale()

    def _positive_scale(self) -> Tensor:
        # Whoever optimises calls constrain_(); this keeps a step in between from harm.
        return self.scale.abs().clamp(min=EPS)

    @torch.no_grad()
    def steps(self, x: Tensor) -> Tensor:
        """Points as whole numbers of `fraction_bits` after the point, in units of the scale.

        In float64 where their sums need it.
        """
        whole = self._of_steps()
        return whole_points(x, *whole.points, whole.unit)

    @property
    def step(self) -> Tensor:
        """What the last fraction bit is worth."""
        return self._of_steps().step

    def fraction_bits(self) -> int:
        """Fraction bits of `steps`, in units of the scale."""
        return self._of_steps().bits

    def _of_steps(self) -> _Whole:
        return self._whole.get(self._make_whole, self.tensors)

    @torch.no_grad()
    def _make_whole(self) -> _Whole:
        scale, levels = self.scale_in_use(), self.grid.levels
        bits = fraction_bits(levels, int(self.tau), float(scale))
        dtype = torch.float64 if bits == MOST_BITS else torch.float32
        points = point_parameters(scale, self.tau, levels)
        unit = torch.full((), 2.0**bits, dtype=dtype, device=scale.device)
        return _Whole(bits, points, unit, scale * 2.0**-bits)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Integer codes of `x`, int32; code 2^bits, one beyond the grid, stands for zero."""
        tau = self.tau.to(torch.int32)
        middles = code_middles(int(tau)).to(tau.device)
        return clamped_codes(x, self.scale_in_use(), middles, tau, self.grid.levels)


def _doubles(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")
