"""What all quantizers share: they observe a tensor, then map it to its grid and back."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ptq4sam.errors import CalibrationError
from ptq4sam.quantization.choices import Choices
from ptq4sam.quantization.dropping import Choice, choose
from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.grids import PointGrid
from ptq4sam.quantization.observers import require_finite
from ptq4sam.quantization.whole import LARGEST_ROW
from ptq4sam.records import NoSettings, Record

if TYPE_CHECKING:
    from ptq4sam.quantization.affine import AffineQuantizer

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
        scale: [], [channels] or [heads], in the units of the data.
        zero_point: the code of zero, as floating point, of that shape.
    """

    settings_type: ClassVar[type[Record]] = NoSettings
    """What a scheme may say of it, beside its bits."""
    slots: ClassVar[tuple[str, ...]] = ("input", "query", "key", "value", "softmax", "state")
    """Of a scheme, which can have it: weights are integers in files and need an even grid."""
    device_bits: ClassVar[int] = 16
    """Bits up to which a device takes its points as whole numbers."""
    can_be_corrected: ClassVar[bool] = False
    """Whether it adds a correction to what it quantizes; see FixedQuantizer."""
    learns_rounding: ClassVar[bool] = False
    """Whether it learns which way to round; see AdaRoundQuantizer."""
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
        """What one of `steps` is worth: [], [channels] or [heads], float32."""
        raise NotImplementedError

    @property
    def largest_row(self) -> float:
        """Sum of a row of softmax outputs behind it, at most."""
        return LARGEST_ROW

    def grid_in_use(self) -> PointGrid:
        """Its points.

        Raises:
            CalibrationError: the quantizer was not calibrated.
        """
        raise NotImplementedError

    def as_affine(self) -> AffineQuantizer | None:
        """Itself, where its points are evenly spaced ones with a scale and a zero point."""
        return None

    def choices(self, low: Tensor, high: Tensor, shares: Sequence[float]) -> Choices | None:
        """What a search may choose from; None where there is nothing to choose.

        Args:
            low: lower end of the widest range, [] or [channels].
            high: its upper end.
            shares: of that range, which are tried where the grid follows from a range.
        """
        del low, high, shares
        return None

    def corrected(self, x: Tensor) -> Tensor:
        """`x` with what is to be added to it: nothing by default."""
        return x

    def stay_soft(self) -> None:
        """Leave learned rounding between two points; nothing where it learns none."""

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
