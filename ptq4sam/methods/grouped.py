"""Groups of channels with ranges of their own, on one step (channel-aware grouping, AHCPTQ, 2025).

Inputs of the decoder's projections, an image or tokens with their positions, have channels that lie
far apart. Here each channel has 2^bits evenly spaced points that need not be around zero, and
channels that are alike share them: by k-means of the ends of channels, which are in one unit.
Published groups are by scale and zero point, of which the latter is up to hundreds of times the
former, and their scales are any numbers, so that each group needs a product of its own.

Devices multiply bytes with one scale for all. So the points of a group are

    (code - z) 2^k s,   0 <= k <= 8 - bits,

multiples of one step s, and all of them lie within 255 steps: of as many points as a byte has, each
group takes those it needs. That is exact in the same integer product as a hybrid grid.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import scipy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ptq4sam.errors import CalibrationError
from ptq4sam.methods.lnq import BYTE, ByteCodes
from ptq4sam.quantization.base import EPS, Quantizer, Statistics
from ptq4sam.quantization.grid import Grid, fake_quantize, steps_from_zero
from ptq4sam.quantization.grids import PointGrid
from ptq4sam.quantization.registry import GRIDS
from ptq4sam.records import FieldError, Record

MOST_BITS = 8
_ROUNDS = 50
"""Of k-means."""


@dataclass(frozen=True)
class Grouped(Record):
    """Settings.

    Attributes:
        groups: how many; each channel is one where there are no more.
    """

    groups: int = 4

    def _validate(self) -> None:
        self._require(self.groups >= 1, "groups", "1 or more")


@dataclass(frozen=True)
class GroupedGrid(PointGrid):
    """Points of every channel: (code - zero) * ratio steps.

    Attributes:
        codes: of each channel, in ascending order of its points.
        scale: [] what a step is worth, float32.
        zero: [channels] whole.
        ratio: [channels] powers of two.
    """

    codes: Grid
    scale: Tensor
    zero: Tensor
    ratio: Tensor
    kind = "grouped"
    channels_last = True

    @property
    def step(self) -> Tensor:
        """What a whole number of 1 is worth."""
        return self.scale

    def whole_points(self) -> Tensor:
        """[channels, points]."""
        codes = torch.arange(self.codes.levels, device=self.zero.device)
        zero, ratio = self.zero.to(torch.int64), self.ratio.to(torch.int64)
        return (codes - zero[:, None]) * ratio[:, None]

    def holds_steps(self, x: Tensor, channel_axis: int | None = None) -> Tensor:
        """Channel by channel where the last axis has them all, else on points of any channel."""
        del channel_axis
        points = self.whole_points().to(x)
        if x.shape[-1:] != self.zero.shape:
            return torch.isin(x, points)
        codes = x / self.ratio.to(x) + self.zero.to(x)
        return (codes == codes.round()) & (codes >= 0) & (codes <= self.codes.qmax)


@GRIDS.register("grouped")
class GroupedQuantizer(Quantizer):
    """Even points of each group of channels, on one step, which is learned.

    Args:
        grid: its bits give the number of points of a channel.
        settings: how many groups.

    Attributes:
        scale: [] what a step is worth.
        zero_point: [channels] code of zero, which need not be one of the codes.
        ratio: [channels] steps between two points.
    """

    settings_type = Grouped
    slots = ("input",)
    scale: nn.Parameter
    ratio: Tensor

    def __init__(self, grid: Grid, settings: Grouped | None = None) -> None:
        super().__init__(ByteCodes(grid.bits))
        if grid.bits > MOST_BITS:
            raise FieldError("bit", f"{grid.bits} given, a grid grouped has up to {MOST_BITS}")
        self._groups = (Grouped() if settings is None else settings).groups
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("ratio", torch.ones(1))
        self._batches = 0
        self._ends = torch.zeros(2, 1, dtype=torch.float64, device="cpu")

    @classmethod
    def of_settings(cls, grid: Grid, settings: Record) -> GroupedQuantizer:
        """See Quantizer."""
        return cls(grid, cast(Grouped, settings))

    def learned(self) -> list[nn.Parameter]:
        """The step."""
        return [self.scale]

    def grid_problems(self) -> Iterator[str]:
        """Points that are no bytes."""
        whole = self.zero_point == self.zero_point.round()
        powers = self.ratio.log2()
        if not bool((whole & (powers == powers.round()) & (powers >= 0)).all()):
            yield "has groups whose points are no whole numbers of steps"
        groups = len(torch.unique(torch.stack([self.zero_point, self.ratio]), dim=1).T)
        if groups > self._groups:
            yield f"has {groups} groups of channels, its scheme has {self._groups}"
        low, high = self.step_bounds
        if high - low > BYTE:
            yield f"has points of {low} to {high} steps, a byte has {BYTE + 1}"

    def grid_in_use(self) -> GroupedGrid:
        """Its points; see Quantizer."""
        return GroupedGrid(self.grid, self.step, self.zero_point, self.ratio)

    def batch_statistics(self, x: Tensor, value: Tensor | None) -> Statistics:
        """Ends of each channel.

        Args:
            x: [..., channels] input of a linear layer.
            value: [channels, outputs] its weight.

        Returns:
            [2, channels].

        Raises:
            CalibrationError: it is no linear layer's.
        """
        if value is None:
            raise CalibrationError(
                "a grouped grid has channels on the last axis, which only inputs of linear layers "
                "have: use another grid here"
            )
        return (torch.stack(torch.aminmax(x.detach().flatten(0, -2), dim=0)).double(),)

    def merge(self, statistics: Statistics) -> None:
        """Set groups by the means of all channels' ends."""
        (ends,) = statistics
        self._batches += 1
        self._ends = self._ends + (ends.cpu() - self._ends) / self._batches
        low, high = self._ends.numpy()
        step, zero, ratio = grouped_points(low, high, self.grid.bits, self._groups)
        parts = (torch.from_numpy(part).to(self.scale) for part in (zero, ratio))
        zero_point, self.ratio = parts
        self._set_parameters(self.scale.new_tensor(step), zero_point)
        self.constrain_()

    def quantize(self, x: Tensor) -> Tensor:
        """Move `x` to its points; gradients reach `x` and the step (LSQ)."""
        scale = self.scale.abs().clamp(min=EPS) * self.ratio
        return fake_quantize(x, scale, self.zero_point, Grid(self.grid.bits), -1)

    @torch.no_grad()
    def steps(self, x: Tensor) -> Tensor:
        """Whole numbers of steps."""
        scale = self.step * self.ratio
        return steps_from_zero(x, scale, self.zero_point, Grid(self.grid.bits), -1) * self.ratio

    @property
    def step(self) -> Tensor:
        """What a whole number of 1 is worth."""
        self._require_calibration()
        return self.scale.detach().abs().clamp(min=EPS)

    @property
    def step_bounds(self) -> tuple[int, int]:
        """The smallest and the largest step, and 0."""
        low = -self.zero_point * self.ratio
        high = low + self.grid.qmax * self.ratio
        return min(0, int(low.min())), max(0, int(high.max()))

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Codes of `x` in its channels, int32."""
        return (self.steps(x) / self.ratio + self.zero_point).to(torch.int32)


def grouped_points(
    low: NDArray[np.float64], high: NDArray[np.float64], bits: int, groups: int
) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
    """One step, and points of all channels that are multiples of it.

    Args:
        low: [channels] smallest numbers.
        high: [channels] largest numbers.
        bits: of a code.
        groups: how many.

    Returns:
        The step; codes of zero [channels]; and steps between points [channels], powers of two.
    """
    # 0 lies between the ends of the byte: what is not reached is cheap, and bounds are about zero.
    bottom, extent = min(0.0, float(low.min())), float(max(0.0, high.max()) - min(0.0, low.min()))
    if extent == 0:
        return 1.0, np.zeros(len(low)), np.ones(len(low))
    for place in _members(np.stack([low, high], axis=1), groups):
        low, high = low.copy(), high.copy()
        low[place], high[place] = low[place].min(), high[place].max()
    last, widest = 2**bits - 1, 2 ** (MOST_BITS - bits)
    # Room for the lowest point, which is a whole number of the widest distances.
    step = extent / ((last - 1) * widest)
    first = np.floor(bottom / (widest * step)) * widest
    ratio = 2.0 ** np.ceil(np.log2(np.maximum((high - low) / (last * step), 1)))
    ratio = np.minimum(ratio, widest)
    middle = (low + high) / 2 / (ratio * step)
    start = np.round(middle - last / 2)
    within = (first / ratio, (first + last * widest) / ratio - last)
    return step, -np.clip(start, *within), ratio


def _members(points: NDArray[np.float64], groups: int) -> Iterator[NDArray[np.intp]]:
    """Places of the points of each group."""
    if len(points) <= groups:
        yield from np.arange(len(points))[:, None]
        return
    # From points far from each other, so that no chance is in it.
    centres = [points[np.argmax(np.ptp(points, axis=1))]]
    while len(centres) < groups:
        distances = [((points - centre) ** 2).sum(1) for centre in centres]
        centres.append(points[np.argmax(np.min(distances, axis=0))])
    with warnings.catch_warnings():
        # A group may lose all of its channels to others.
        warnings.simplefilter("ignore", UserWarning)
        _, found = scipy.cluster.vq.kmeans2(points, np.stack(centres), iter=_ROUNDS, minit="matrix")
    for group in np.unique(found):
        yield np.flatnonzero(found == group)
