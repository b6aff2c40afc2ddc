"""What all quantizers share: they observe a tensor, then map it to its grid and back."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ptq4sam.errors import CalibrationError
from ptq4sam.quantization.dropping import Choice, choose
from ptq4sam.quantization.grid import Grid, affine_codes, fake_quantize, steps_from_zero
from ptq4sam.quantization.grids import AffineGrid, PointGrid
from ptq4sam.quantization.observers import OBSERVERS, require_finite
from ptq4sam.records import NoSettings, Record

Statistics = tuple[Tensor, ...]
"""What a quantizer keeps of one batch: a few numbers."""
EPS = torch.finfo(torch.float32).eps
"""Smallest learned scale."""


class Mode(enum.Enum):
    """What a quantizer does with what passes it."""

    FLOAT = "float"
    """Nothing."""
    OBSERVE = "observe"
    """Takes its range into account and lets it pass as it is."""
    QUANTIZE = "quantize"
    """Moves it to the grid."""


class Quantizer(nn.Module):
    """Base of all quantizers.

    Subclasses register `scale` (a buffer, or a parameter where it is learned) and implement
    `batch_statistics`, `merge`, `quantize` and `codes`. Those of a grid that schemes assign by slot
    (GRIDS) are made by `of_settings`, have whole `steps`, and say in `grid_in_use` what these are.

    Args:
        grid: the codes allowed.

    Attributes:
        mode: what it does with its input.
        name: path in the model, for messages.
        drop_probability: probability that an element of the output is the float value (QDrop, Wei
            et al. 2022); 0 is off.
        generator: source of that choice; None is torch's own.
        recorded: receives the statistics of batches instead of merging them; None while it merges.
        scale: [] or [channels], in the units of the data.
        zero_point: the code of zero, as floating point, of that shape.
    """

    settings_type: ClassVar[type[Record]] = NoSettings
    """What a scheme may say of it, beside its bits."""
    slots: ClassVar[tuple[str, ...]] = ("input", "query", "key", "value", "softmax", "state")
    """Of a scheme, which can have it: weights are integers in files and need an even grid."""
    scale: Tensor
    zero_point: Tensor
    calibrated: Tensor

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.mode = Mode.QUANTIZE
        self.name = ""
        self.drop_probability = 0.0
        self.generator: torch.Generator | None = None
        self.recorded: list[Statistics] | None = None
        # The flag is read at every forward: a copy in Python spares waiting for a device.
        self._is_calibrated = False
        self.register_buffer("calibrated", torch.tensor(False))
        self.register_buffer("zero_point", torch.zeros(()))

    @classmethod
    def of_settings(cls, grid: Grid, settings: Record) -> Quantizer:
        """Make one for a slot.

        Args:
            grid: the codes allowed.
            settings: a record of `settings_type`.
        """
        del settings
        return cls(grid)

    @property
    def is_calibrated(self) -> bool:
        """Whether scale and zero point were set by calibration or read from a file."""
        return self._is_calibrated

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Its own parameters and buffers, from which all that it gives follows."""
        own = (*self._parameters.values(), *self._buffers.values())
        return tuple(tensor for tensor in own if tensor is not None)

    @property
    def step_bounds(self) -> tuple[int, int]:
        """The smallest and the largest of `steps`, or numbers beyond; 0 lies between."""
        return -self.grid.largest_step, self.grid.largest_step

    @property
    def is_whole(self) -> bool:
        """Whether all that it gives now lies on its grid, so that `steps` says the same."""
        return self.mode is Mode.QUANTIZE and self.drop_probability == 0

    def forward(self, x: Tensor, value: Tensor | None = None, *, steps: bool = False) -> Tensor:
        """Observe or quantize `x`, as the mode says.

        Args:
            x: any shape.
            value: what `x` will be multiplied with, [..., m, channels] for `x` [..., n, m]; some
                quantizers weigh errors by it when they observe.
            steps: give whole numbers of steps (see `steps`); only where `is_whole`.

        Returns:
            The shape of `x`.

        Raises:
            CalibrationError: it was not calibrated, or `x` gives no range.
        """
        if self.mode is Mode.FLOAT:
            return x
        if self.mode is Mode.OBSERVE:
            self._observe(x, value)
            return x
        self._require_calibration()
        if steps:
            return self.steps(x)
        if self.drop_probability > 0:
            return self.quantize_some(x, choose(x, self.drop_probability, self.generator))
        return self.quantize(x)

    def observe(self, x: Tensor, value: Tensor | None) -> None:
        """Take a finite batch into account and set the scale by all so far."""
        self.merge(self.batch_statistics(x, value))

    def batch_statistics(self, x: Tensor, value: Tensor | None) -> Statistics:
        """What matters of a finite batch."""
        raise NotImplementedError

    def merge(self, statistics: Statistics) -> None:
        """Set the scale by the statistics of a batch and of all before it."""
        raise NotImplementedError

    def quantize(self, x: Tensor) -> Tensor:
        """Move `x` to the grid."""
        raise NotImplementedError

    def quantize_some(self, x: Tensor, choice: Choice) -> Tensor:
        """Move `x` to the grid, but for the elements that stay float (QDrop)."""
        return choice.mix(self.quantize(x), x)

    def codes(self, x: Tensor) -> Tensor:
        """Integer codes of `x`, int32.

        Raises:
            CalibrationError: the quantizer was not calibrated.
        """
        raise NotImplementedError

    def steps(self, x: Tensor) -> Tensor:
        """Whole numbers, as floating point, each of which is worth `step`; no gradients.

        Of `x` rounded to float32, which it is but for a softmax output.
        """
        raise NotImplementedError

    @property
    def step(self) -> Tensor:
        """What one of `steps` is worth: [] or [channels], float32."""
        raise NotImplementedError

    def grid_in_use(self) -> PointGrid:
        """Its points.

        Raises:
            CalibrationError: the quantizer was not calibrated.
        """
        raise NotImplementedError

    def problems(self) -> Iterator[str]:
        """What of its numbers no grid has."""
        if not self.is_calibrated:
            yield "has no scale, expected one from calibration or a file"
            return
        scale = self.scale.detach()
        bad = scale[~(torch.isfinite(scale) & (scale > 0))]
        if bad.numel():
            yield f"has a scale of {float(bad[0]):.4g}, expected one above 0"
            return
        yield from self.grid_problems()

    def grid_problems(self) -> Iterator[str]:
        """What beside a usable scale is missing; nothing by default."""
        yield from ()

    def unlike(self, other: Quantizer) -> Iterator[tuple[str, str]]:
        """What it is, and what another that was to be like it is, where they differ."""
        own, wanted = self.grid, other.grid
        if own.bits != wanted.bits:
            yield f"has {own.bits} bits", f"{wanted.bits} bits"
        if type(self) is not type(other):
            yield f"is of {type(self).__name__}", type(other).__name__
        elif own.symmetric != wanted.symmetric:
            kinds = ("asymmetric", "symmetric")
            yield f"is {kinds[own.symmetric]}", kinds[wanted.symmetric]

    def derived(self) -> dict[str, Tensor]:
        """The part of its state that is the same whatever was calibrated: files do without."""
        return {"calibrated": torch.tensor(True, device="cpu")}

    def learned(self) -> list[nn.Parameter]:
        """What reconstruction learns of it, besides the rounding of weights; nothing by default."""
        return []

    @torch.no_grad()
    def constrain_(self) -> None:
        """Make what is learned usable again after an optimiser's step: |s|, at least EPS."""
        self.scale.abs_().clamp_(min=EPS)

    @torch.no_grad()
    def finish_learning(self) -> None:
        """Leave nothing of what was learned that a device could not hold."""

    def freeze(self) -> None:
        """Drop what is not needed any more once weights themselves lie on the grid."""

    def extra_repr(self) -> str:
        """Bits and mode."""
        kind = "symmetric" if self.grid.symmetric else "asymmetric"
        return f"{self.grid.bits} bits, {kind}, {self.mode.value}"

    def _label(self) -> str:
        return f"quantizer {self.name}" if self.name else f"a {type(self).__name__} without a name"

    @torch.no_grad()
    def _observe(self, x: Tensor, value: Tensor | None) -> None:
        try:
            require_finite(x)
            if self.recorded is None:
                self.observe(x, value)
            else:
                statistics = self.batch_statistics(x, value)
                self.recorded.append(tuple(number.cpu() for number in statistics))
        except CalibrationError as error:
            raise CalibrationError(f"{self._label()}: {error}") from error

    def _require_calibration(self) -> None:
        if not self._is_calibrated:
            raise CalibrationError(
                f"{self._label()} was asked to quantize but has no scale: calibrate the model first"
            )

    def _set_parameters(self, scale: Tensor, zero_point: Tensor) -> None:
        self.scale.data = scale
        self.zero_point = zero_point
        self.calibrated.fill_(True)
        self._is_calibrated = True

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # One scale a channel has a size that only calibration knows.
        for name, own in [
            *self.named_parameters(recurse=False),
            *self.named_buffers(recurse=False),
        ]:
            saved = state_dict.get(prefix + name)
            if saved is not None and saved.shape != own.shape:
                own.data = own.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._is_calibrated = bool(self.calibrated)


class AffineQuantizer(Quantizer):
    """Evenly spaced points: one scale and zero point a tensor or a channel.

    Args:
        grid: the codes allowed.
        observer: name of the observer that sets the range, a key of OBSERVERS.
        channel_axis: axis with a scale for each index; None for one in all.
    """

    slots = ("weight", *Quantizer.slots)

    def __init__(
        self, grid: Grid, observer: str = "MinMaxObserver", channel_axis: int | None = None
    ) -> None:
        super().__init__(grid)
        self.channel_axis = channel_axis
        self.observer = OBSERVERS[observer](grid, channel_axis)

    def batch_statistics(self, x: Tensor, value: Tensor | None) -> Statistics:
        """Ends of a batch's range."""
        return self.observer.range_of(x)

    def merge(self, statistics: Statistics) -> None:
        """Set scale and zero point by a batch's range and all before it."""
        low, high = (end.to(self.scale.device) for end in statistics)
        self.observer.merge(low, high)
        self._set_parameters(*self.observer.quantization_parameters())

    def set_parameters(self, scale: Tensor, zero_point: Tensor) -> None:
        """Choose scale and zero point otherwise than by what was observed."""
        self._set_parameters(scale, zero_point)

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
        return AffineGrid(self.grid, *self.parameters_in_use())

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
        return steps_from_zero(x, scale, zero_point, self.grid, self.channel_axis)

    @property
    def step(self) -> Tensor:
        """The scale."""
        return self.parameters_in_use()[0]

    @property
    def step_bounds(self) -> tuple[int, int]:
        """Codes less the zero point, or the zero points of all channels."""
        low, high = torch.aminmax(self.parameters_in_use()[1])
        return min(0, self.grid.qmin - int(high)), max(0, self.grid.qmax - int(low))

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
