"""Evenly spaced points: one scale and zero point a tensor, a channel or a head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ptq4sam.errors import ConfigError
from ptq4sam.quantization.base import Mode, Quantizer, Statistics
from ptq4sam.quantization.choices import Choices, ranges
from ptq4sam.quantization.grid import (
    Grid,
    affine_codes,
    along_channels,
    fake_quantize,
    steps_from_zero,
)
from ptq4sam.quantization.grids import AffineGrid, GroupedAffineGrid
from ptq4sam.quantization.groups import group_count, on_one_step, ratio_of, step_of
from ptq4sam.quantization.modes import quantizer_mode
from ptq4sam.quantization.observers import OBSERVERS


class AffineQuantizer(Quantizer):
    """Evenly spaced points: one scale and zero point a tensor, a channel or a head.

    Args:
        grid: the codes allowed.
        observer: name of the observer that sets the range, a key of OBSERVERS.
        channel_axis: axis with a scale for each index (that of heads is `slots.HEADS`); None for
            one in all.

    Attributes:
        group_size: input channels of a weight that share a scale; None where all do.
    """

    slots = ("weight", *Quantizer.slots)

    def __init__(
        self, grid: Grid, observer: str = "MinMaxObserver", channel_axis: int | None = None
    ) -> None:
        super().__init__(grid)
        self.channel_axis = channel_axis
        self.group_size: int | None = None
        self._channels = 1
        self.observer = OBSERVERS[observer](grid, channel_axis)

    def batch_statistics(self, x: Tensor, value: Tensor | None) -> Statistics:
        """Ends of a batch's range."""
        if self.group_size is None:
            return self.observer.range_of(x)
        channels, groups = self.parameter_shape(x.shape)
        self._channels = channels
        return self.observer.range_of(x.reshape(channels * groups, -1))

    def merge(self, statistics: Statistics) -> None:
        """Set scale and zero point by a batch's range and all before it."""
        low, high = (end.to(self.scale.device) for end in statistics)
        self.observer.merge(low, high)
        scale, zero_point = self.observer.quantization_parameters()
        if self.group_size is not None:
            low = self.observer.minimum
            scale, zero_point = on_one_step(low, scale, self.grid, self._channels)
        self._set_parameters(scale, zero_point)

    def parameter_shape(self, shape: torch.Size) -> tuple[int, ...]:
        """The shape of scale and zero point for a tensor of a shape.

        Raises:
            ConfigError: its input channels cannot be cut into groups.
        """
        if self.channel_axis is None:
            return ()
        if self.group_size is None:
            return (shape[self.channel_axis],)
        groups = group_count(shape[1], self.group_size)
        if groups is None:
            raise ConfigError(
                f"{shape[1]} input channels were to be cut into groups of {self.group_size}, which "
                f"leaves {shape[1] % self.group_size}: use a group_size that divides them"
            )
        return shape[0], groups

    def set_parameters(self, scale: Tensor, zero_point: Tensor) -> None:
        """Choose scale and zero point otherwise than by what was observed."""
        self._set_parameters(scale, zero_point)

    def as_affine(self) -> AffineQuantizer:
        """Itself."""
        return self

    def choices(self, low: Tensor, high: Tensor, shares: Sequence[float]) -> Choices | None:
        """Shares of the widest range; the one that it has is the first. Groups have none."""
        if self.group_size is not None:
            return None
        own = (self.scale, self.zero_point)
        return ranges(self.grid, own, (low, high), shares, self.set_parameters)

    def quantize(self, x: Tensor) -> Tensor:
        """Move `x` to the nearest point of the grid."""
        return fake_quantize(x, self.scale, self.zero_point, self.grid, self.channel_axis)

    def parameters_in_use(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point that it quantizes with; learned ones are made usable first.

        Raises:
            CalibrationError: the quantizer was not calibrated.
        """
        self._require_calibration()
        return self.scale.detach(), self.zero_point.detach()

    def grid_in_use(self) -> AffineGrid:
        """Its points; see Quantizer."""
        kind = AffineGrid if self.group_size is None else GroupedAffineGrid
        return kind(self.grid, *self.parameters_in_use())

    def grid_problems(self) -> Iterator[str]:
        """Zero points that are no codes."""
        low, high = (0, 0) if self.grid.symmetric else (self.grid.qmin, self.grid.qmax)
        zero_point = self.parameters_in_use()[1]
        usable = (zero_point == zero_point.round()) & (zero_point >= low) & (zero_point <= high)
        bad = zero_point[~usable]
        if bad.numel():
            said = "0" if self.grid.symmetric else f"a whole number from {low} to {high}"
            yield f"has the zero point {float(bad[0]):.6g}, expected {said}"

    @torch.no_grad()
    def steps(self, x: Tensor) -> Tensor:
        """Codes of `x` less the zero point; `quantize` gives these times the scale."""
        scale, zero_point = self.parameters_in_use()
        return self._of_groups(steps_from_zero(x, scale, zero_point, self.grid, self.channel_axis))

    def _of_groups(self, codes: Tensor) -> Tensor:
        """Codes less the zero point in steps."""
        if self.group_size is None:
            return codes
        return codes * along_channels(ratio_of(self.scale.detach()), codes.shape, 0)

    @property
    def step(self) -> Tensor:
        """The scale, or what those of groups are powers of two of."""
        return step_of(self.parameters_in_use()[0])

    @property
    def step_bounds(self) -> tuple[int, int]:
        """Codes less the zero point, or the zero points of all channels."""
        scale, zero_point = self.parameters_in_use()
        low, high = torch.aminmax(zero_point)
        widest = 1 if self.group_size is None else int(ratio_of(scale).max())
        bounds = self.grid.qmin - int(high), self.grid.qmax - int(low)
        return widest * min(0, bounds[0]), widest * max(0, bounds[1])

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Integer codes of `x` in qmin..qmax, int32."""
        scale, zero_point = self.parameters_in_use()
        codes = affine_codes(x, scale, zero_point, self.grid, self.channel_axis)
        return codes.to(torch.int32)


class FixedQuantizer(AffineQuantizer):
    """Scale and zero point stay what calibration made them.

    Attributes:
        correction: of a weight, what is added to it before it is quantized, but not while the
            quantizer is off: the float model stays what it was. Empty for nothing.
    """

    can_be_corrected = True
    correction: Tensor

    def __init__(
        self, grid: Grid, observer: str = "MinMaxObserver", channel_axis: int | None = None
    ) -> None:
        super().__init__(grid, observer, channel_axis)
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("correction", torch.empty(0))

    def forward(self, x: Tensor, value: Tensor | None = None, *, steps: bool = False) -> Tensor:
        """See Quantizer."""
        given = x if self.mode is Mode.FLOAT else self.corrected(x)
        return super().forward(given, value, steps=steps)

    @torch.no_grad()
    def correct(self, weight: Tensor, correction: Tensor) -> None:
        """Add a correction to a weight from now on, with the range of both together."""
        self.correction = correction
        self.observer.reset()
        with quantizer_mode(self, Mode.OBSERVE):
            self(weight)

    def corrected(self, x: Tensor) -> Tensor:
        """`x` with what is to be added to it."""
        return x + self.correction if self.correction.numel() else x

    def derived(self) -> dict[str, Tensor]:
        """No correction: a frozen weight is on its grid."""
        return {**super().derived(), "correction": torch.empty(0, device="cpu")}

    def freeze(self) -> None:
        """Drop the correction."""
        self.correction = self.correction.new_empty(0)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # Unpacked files of the first version have none.
        state_dict.setdefault(f"{prefix}correction", self.correction.new_empty(0))
        super()._load_from_state_dict(state_dict, prefix, *args)
