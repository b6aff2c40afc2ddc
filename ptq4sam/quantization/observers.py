"""Observers: they see one batch of a tensor after another and end up with a range."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from ptq4sam.errors import CalibrationError, ConfigError
from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.mse import (
    MAX_SEARCH_BITS,
    Side,
    fast_search,
    grid_search,
    side_of,
)
from ptq4sam.quantization.registry import OBSERVERS

__all__ = ["OBSERVERS", "Observer", "require_finite"]


class Observer(nn.Module):
    """Collects a range; a new observer is one method, `batch_range`.

    Args:
        grid: the codes that the range will be divided into.
        channel_axis: axis with a range for each index; None for one range in all.

    Attributes:
        minimum: lower ends so far, [] or [channels].
        maximum: upper ends so far.
        batches: how many batches were observed.

    Raises:
        ConfigError: the observer works per tensor only, and a channel axis was given.
    """

    averages: ClassVar[bool] = False
    """Whether ranges of batches are averaged; else the widest ends count."""
    per_tensor_only: ClassVar[bool] = False
    minimum: Tensor
    maximum: Tensor

    def __init__(self, grid: Grid, channel_axis: int | None = None) -> None:
        super().__init__()
        if channel_axis is not None and (self.per_tensor_only or self.averages):
            raise ConfigError(
                f"{type(self).__name__} was asked for one range a channel, it has one a tensor: "
                "use one that has, as MinMaxObserver or MSEObserver, or no channel axis"
            )
        self.grid = grid
        self.channel_axis = channel_axis
        self.batches = 0
        self.register_buffer("minimum", torch.tensor(math.inf), persistent=False)
        self.register_buffer("maximum", torch.tensor(-math.inf), persistent=False)

    def reset(self) -> None:
        """Forget what was observed."""
        self.batches = 0

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Take one batch into account.

        Raises:
            CalibrationError: `x` is empty or has values that are not finite.
        """
        self.merge(*self.range_of(x))

    @torch.no_grad()
    def range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Ends of a batch's range, [] or [channels] each.

        Raises:
            CalibrationError: `x` is empty or has values that are not finite.
        """
        require_finite(x)
        rows = x.detach().float()
        if self.channel_axis is None:
            rows = rows.reshape(1, -1)
        else:
            rows = rows.movedim(self.channel_axis, 0).flatten(1)
        low, high = self.batch_range(rows)
        return (low[0], high[0]) if self.channel_axis is None else (low, high)

    def batch_range(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The range of one batch.

        Args:
            rows: [channels, elements] float32; one row where there is one range in all.

        Returns:
            Lower and upper ends, [channels] each.
        """
        raise NotImplementedError

    def quantization_parameters(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the range so far, [] or [channels].

        Raises:
            CalibrationError: nothing was observed.
        """
        if self.batches == 0:
            raise CalibrationError(
                "a range was asked for, but nothing was observed: run calibration data first"
            )
        return self.grid.affine_parameters(self.minimum, self.maximum)

    def merge(self, low: Tensor, high: Tensor) -> None:
        """Take the range of a batch into account."""
        if self.batches == 0:
            self.minimum, self.maximum = low.clone(), high.clone()
        elif self.averages:
            self.minimum = self.minimum + (low - self.minimum) / (self.batches + 1)
            self.maximum = self.maximum + (high - self.maximum) / (self.batches + 1)
        else:
            self.minimum = torch.minimum(self.minimum, low)
            self.maximum = torch.maximum(self.maximum, high)
        self.batches += 1


def require_finite(x: Tensor) -> None:
    """Refuse a tensor that gives no range.

    Raises:
        CalibrationError: `x` is empty or has values that are not finite.
    """
    if x.numel() == 0:
        raise CalibrationError(
            f"an empty tensor {list(x.shape)} was to be observed: give every calibration picture "
            "at least one prompt"
        )
    # A NaN reaches both ends, so that no mask of the whole tensor is needed.
    low, high = torch.aminmax(x.detach())
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        bad = int((~torch.isfinite(x)).sum())
        raise CalibrationError(
            f"{bad} of {x.numel()} observed values are NaN or infinite: check the weights and the "
            "calibration pictures"
        )


@OBSERVERS.register("MinMaxObserver")
class MinMaxObserver(Observer):
    """Smallest and largest value seen."""

    def batch_range(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest value of each row."""
        low, high = torch.aminmax(rows, dim=1)
        return low, high


class _Moving(Observer):
    """Moving averages of the ends of batches, which begin at the first's.

    A batch counts `momentum`, so that of few batches the first one tells most.
    """

    momentum: ClassVar[float] = 0.01

    def merge(self, low: Tensor, high: Tensor) -> None:
        """Move both ends towards a batch's."""
        if self.batches == 0:
            super().merge(low, high)
            return
        self.minimum = self.minimum + (low - self.minimum) * self.momentum
        self.maximum = self.maximum + (high - self.maximum) * self.momentum
        self.batches += 1


@OBSERVERS.register("MovingMinMaxObserver")
class MovingMinMaxObserver(_Moving, MinMaxObserver):
    """Moving averages of the smallest and largest values of batches."""


@OBSERVERS.register("AvgMinMaxObserver")
class AvgMinMaxObserver(MinMaxObserver):
    """Mean over batches of their smallest and largest values."""

    averages = True


@OBSERVERS.register("MSEObserver")
class MSEObserver(Observer):
    """The range of least mean |q(x) - x|^2.4, from a grid of widths and shifts.

    A batch on one side of zero has a search of its own. The published observer takes the side of
    the first batch for all, which gives a later one on another side a range without its values.

    Raises:
        ConfigError: an asymmetric grid of more than `MAX_SEARCH_BITS` bits, which would take hours.
    """

    max_bits: ClassVar[int] = MAX_SEARCH_BITS

    def __init__(self, grid: Grid, channel_axis: int | None = None) -> None:
        super().__init__(grid, channel_axis)
        if not grid.symmetric and grid.bits > self.max_bits:
            raise ConfigError(
                f"{type(self).__name__} was asked for {grid.bits} bits, it can search up to "
                f"{self.max_bits}: use MSEFastObserver or MinMaxObserver"
            )

    def batch_range(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Search each row's range."""
        return self._search(rows, side_of(rows))

    def _search(self, rows: Tensor, side: Side) -> tuple[Tensor, Tensor]:
        return grid_search(rows, self.grid, side)


@OBSERVERS.register("AvgMSEObserver")
class AvgMSEObserver(MSEObserver):
    """Mean over batches of the ranges of MSEObserver."""

    averages = True


@OBSERVERS.register("MSEFastObserver")
class MSEFastObserver(MSEObserver):
    """The objective of MSEObserver by bounded scalar minimisation."""

    max_bits = 16

    def _search(self, rows: Tensor, side: Side) -> tuple[Tensor, Tensor]:
        return fast_search(rows, self.grid, side)


@OBSERVERS.register("AvgMSEFastObserver")
class AvgMSEFastObserver(MSEFastObserver):
    """Mean over batches of the ranges of MSEFastObserver."""

    averages = True


@OBSERVERS.register("PCTObserver")
class PCTObserver(Observer):
    """The two-sided percentile 0.99999.

    The published observer chooses among 0.99, 0.999, 0.9999 and 0.99999 by squared error. Its
    results are those of the error of clipping, which is least for the widest: choosing by the error
    of fake quantization would contradict most of its recorded cases.
    """

    percentile: ClassVar[float] = 0.99999

    def batch_range(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Quantiles 1 - p and p of each row, interpolated linearly."""
        elements = rows.shape[1]
        position = (1 - self.percentile) * (elements - 1)
        index = int(position)
        depth = min(index + 2, elements)
        ends = []
        for largest in (False, True):
            tail = rows.topk(depth, dim=1, largest=largest).values
            ends.append(torch.lerp(tail[:, index], tail[:, depth - 1], position - index))
        return ends[0], ends[1]


@OBSERVERS.register("MovingPCTObserver")
class MovingPCTObserver(_Moving, PCTObserver):
    """Moving averages of the percentiles of batches."""
