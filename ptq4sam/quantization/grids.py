"""The points that a tensor may take, with the numbers that a calibrated quantizer has now.

A grid knows its points as values and as whole numbers of one step, so that audit, files, reports
and exports need not know which kind it is. A grid that is not even derives from `PointGrid` too,
beside its quantizer; exports find out how to lower it by its type.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ptq4sam.quantization.grid import Grid, along_channels
from ptq4sam.quantization.groups import ratio_of, step_of

_ROUNDING = 0.01
"""How far a value may lie from its point, in steps: as much as float32 leaves of 16 bits."""


class PointGrid(ABC):
    """Points that are whole multiples of one step."""

    kind: str
    """As a scheme names it."""
    codes: Grid
    """How many codes, and of which bits."""
    channels_last: ClassVar[bool] = False
    """Whether each index of the last axis has points of its own."""

    @property
    @abstractmethod
    def step(self) -> Tensor:
        """What a whole number of 1 is worth, float32 [] or [channels]."""

    @abstractmethod
    def whole_points(self) -> Tensor:
        """Points as whole numbers, int64 [points], or [channels, points], in ascending order."""

    def points(self) -> Tensor:
        """Points as values, float64 [points], or [channels, points], in ascending order."""
        whole, step = self.whole_points().double(), self.step.double()
        return whole * (step[..., None] if step.dim() else step).to(whole.device)

    def ends(self) -> tuple[float, float]:
        """The smallest and the largest point, of all channels."""
        low, high = torch.aminmax(self.points())
        return float(low), float(high)

    def facts(self) -> dict[str, Any]:
        """What a report tells of softmax outputs on it; see `distributions.Softmax`."""
        above = tuple(point for point in self.points().flatten().tolist() if point > 0)
        return {"scale": float(self.step.max()), "points": above}

    def holds_steps(self, x: Tensor, channel_axis: int | None = None) -> Tensor:
        """Which whole numbers are points, as booleans.

        Args:
            x: any shape, float64.
            channel_axis: axis of `x` with a grid for each index; None for one in all.
        """
        del channel_axis
        return torch.isin(x, self.whole_points().to(x))

    def holds(self, x: Tensor, channel_axis: int | None = None) -> Tensor:
        """Which values are points, but for the rounding of float32; see `holds_steps`."""
        steps = x / along_channels(self.step.to(x), x.shape, channel_axis)
        near = (steps - steps.round()).abs() <= _ROUNDING
        return near & self.holds_steps(steps.round(), channel_axis)


@dataclass(frozen=True)
class AffineGrid(PointGrid):
    """Evenly spaced points: (code - zero point) * scale.

    Attributes:
        codes: bits, and whether they are signed.
        scale: float32 [] or [channels].
        zero_point: the code of zero, whole, as floating point, in the shape of `scale`.
    """

    codes: Grid
    scale: Tensor
    zero_point: Tensor
    kind = "affine"

    @property
    def step(self) -> Tensor:
        """The scale."""
        return self.scale

    def whole_points(self) -> Tensor:
        """Codes less the zero point."""
        codes = torch.arange(self.codes.qmin, self.codes.qmax + 1, device=self.scale.device)
        zero_point = self.zero_point.to(torch.int64)
        return codes - (zero_point[..., None] if zero_point.dim() else zero_point)

    def facts(self) -> dict[str, Any]:
        """Scale and the place of zero among the codes."""
        zero_point = int(self.zero_point.flatten()[0]) - self.codes.qmin
        return {"scale": float(self.scale.max()), "zero_point": zero_point}

    def ends(self) -> tuple[float, float]:
        """Without a list of all points."""
        first, last = (
            (end - self.zero_point) * self.scale for end in (self.codes.qmin, self.codes.qmax)
        )
        return float(first.min()), float(last.max())

    def holds_steps(self, x: Tensor, channel_axis: int | None = None) -> Tensor:
        """Without a list of all points: whole numbers between two ends."""
        codes = x + along_channels(self.zero_point.to(x), x.shape, channel_axis)
        return (x == x.round()) & (codes >= self.codes.qmin) & (codes <= self.codes.qmax)


@dataclass(frozen=True)
class GroupedAffineGrid(AffineGrid):
    """Evenly spaced points of groups of a weight's input channels; see `groups`.

    Scale and zero point are [channels, groups]. A number of a channel is a point where it is one of
    any of its groups.
    """

    @property
    def step(self) -> Tensor:
        """[channels]."""
        return step_of(self.scale)

    def whole_points(self) -> Tensor:
        """[channels, points] of all groups; some stand more than once."""
        whole = super().whole_points() * ratio_of(self.scale).to(torch.int64)[..., None]
        return whole.flatten(1).sort().values

    def holds_steps(self, x: Tensor, channel_axis: int | None = None) -> Tensor:
        """Group by group; `channel_axis` is that of the output channels."""
        ratio, found = ratio_of(self.scale), torch.zeros_like(x, dtype=torch.bool)
        for place in range(self.scale.shape[1]):
            zero, of_group = (
                along_channels(parameter[:, place].to(x), x.shape, channel_axis)
                for parameter in (self.zero_point, ratio)
            )
            codes = x / of_group + zero
            within = (codes >= self.codes.qmin) & (codes <= self.codes.qmax)
            found |= within & (codes == codes.round())
        return found
