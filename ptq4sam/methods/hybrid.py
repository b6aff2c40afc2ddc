"""Hybrid log-uniform quantization of what comes behind an activation (AHCPTQ, 2025, section 3.2).

Outputs of a GELU or ReLU are dense at their lowest value and thin far above it: logarithmic points
up to a knee, even ones above. Published quantizers test their codes on a tensor that is half
rewritten, so that values above the number of logarithmic codes fall onto the knee; here each value
is looked at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ptq4sam.errors import CalibrationError
from ptq4sam.methods import hybrid_kernels
from ptq4sam.methods.hybrid_grid import (
    DEVICE_BITS,
    HybridCodes,
    HybridGrid,
    HybridNumbers,
    hybrid_numbers,
    log_codes,
)
from ptq4sam.quantization.base import EPS, Quantizer, Statistics
from ptq4sam.quantization.choices import Choices
from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.memo import Memo
from ptq4sam.quantization.registry import GRIDS
from ptq4sam.records import Record


@dataclass(frozen=True)
class Hybrid(Record):
    """What a scheme says of a hybrid grid: the search chooses among all pairs.

    Attributes:
        knee_rates: where the even part begins, as shares of the range.
        log_shares: shares of the codes that are logarithmic.
    """

    knee_rates: tuple[float, ...] = (0.1, 0.3, 0.5)
    log_shares: tuple[float, ...] = (0.125, 0.25, 0.5)

    def _validate(self) -> None:
        for key in ("knee_rates", "log_shares"):
            values = getattr(self, key)
            self._require(
                len(values) > 0 and all(0 < x < 1 for x in values), key, "some between 0 and 1"
            )


@GRIDS.register("hybrid")
class HybridQuantizer(Quantizer):
    """Logarithmic points up to a knee, even ones above it; both scales are learned.

    Args:
        grid: its bits give the number of points.
        settings: what the search chooses from.

    Attributes:
        scale: [] the knee, above the lowest value.
        even_scale: [] distance of the even points.
        minimum: [] the lowest value.
        logarithmic: [] how many codes are.
    """

    settings_type = Hybrid
    device_bits = DEVICE_BITS
    scale: nn.Parameter
    even_scale: nn.Parameter
    minimum: Tensor
    logarithmic: Tensor

    def __init__(self, grid: Grid, settings: Hybrid | None = None) -> None:
        super().__init__(HybridCodes(grid.bits))
        settings = Hybrid() if settings is None else settings
        self._pairs = tuple(itertools.product(settings.knee_rates, settings.log_shares))
        self.scale = nn.Parameter(torch.ones(()))
        self.even_scale = nn.Parameter(torch.ones(()))
        self.register_buffer("minimum", torch.zeros(()))
        self.register_buffer("logarithmic", torch.ones(()))
        self._logarithmic = 1
        self._pair = 0
        self._numbers: Memo[HybridNumbers] = Memo()
        self._batches, self._low, self._high = 0, 0.0, 0.0
        self._errors = [0.0] * len(self._pairs)

    @classmethod
    def of_settings(cls, grid: Grid, settings: Record) -> HybridQuantizer:
        """See Quantizer."""
        return cls(grid, cast(Hybrid, settings))

    def learned(self) -> list[nn.Parameter]:
        """Both scales."""
        return [self.scale, self.even_scale]

    @torch.no_grad()
    def constrain_(self) -> None:
        """Both positive."""
        # What fused optimisers do is not counted.
        self._numbers.clear()
        for scale in self.learned():
            scale.abs_().clamp_(min=EPS)

    def derived(self) -> dict[str, Tensor]:
        """No zero point."""
        return {**super().derived(), "zero_point": torch.zeros((), device="cpu")}

    def grid_problems(self) -> Iterator[str]:
        """Even steps or numbers of codes that no grid has."""
        even_scale, codes = float(self.even_scale), float(self.logarithmic)
        if not 0 < even_scale < float("inf"):
            yield f"has even steps of {even_scale:.4g}, expected more than 0"
        if not (codes == round(codes) and 1 <= codes <= self.grid.levels - 2):
            yield f"has {codes:g} logarithmic codes, expected 1 to {self.grid.levels - 2}"

    def batch_statistics(self, x: Tensor, value: Tensor | None) -> Statistics:
        """Ends of the batch, and what each pair of the search does to the product.

        Args:
            x: [..., n, m] input of a layer.
            value: [m, channels] the weight it is multiplied with; without one the error is that of
                `x` itself.

        Returns:
            Ends [], and mean squared errors of the product [pairs], float64.
        """
        low, high = torch.aminmax(x.detach())
        # 0 is among the values, as on an even grid.
        low, high = low.clamp(max=0).double(), high.clamp(min=0).double()
        if float(high - low) == 0:
            raise CalibrationError(
                "all values are 0, which leaves no room for two kinds of points: use another grid"
            )
        errors: dict[tuple[int, float], Tensor] = {}
        for rate, share in self._pairs:
            codes = log_codes(self.grid.bits, share, rate)
            if (codes, rate) not in errors:
                knee, even_scale = self._scales(high - low, rate, codes)
                numbers = hybrid_numbers(knee, even_scale, low, self.grid.bits, codes)
                difference = hybrid_kernels.points(x, *numbers, self._even(codes)) - x
                product = difference if value is None else difference @ value
                errors[codes, rate] = product.double().square().mean()
        by_pair = [
            errors[log_codes(self.grid.bits, share, rate), rate] for rate, share in self._pairs
        ]
        return low, high, torch.stack(by_pair)

    def merge(self, statistics: Statistics) -> None:
        """Set the pair of the least error over all batches, by the mean of their ends."""
        low, high, errors = statistics
        self._batches += 1
        self._low += (float(low) - self._low) / self._batches
        self._high += (float(high) - self._high) / self._batches
        self._errors = [a + b for a, b in zip(self._errors, errors.tolist(), strict=True)]
        self.use_pair(self._errors.index(min(self._errors)))

    def choices(self, low: Tensor, high: Tensor, shares: Sequence[float]) -> Choices:
        """Pairs of a knee and a share of logarithmic codes, for the range that was observed.

        The one that it has is the first, by which a search tells whether it changed something.
        """
        del low, high, shares
        order = sorted(range(len(self._pairs)), key=lambda pair: pair != self._pair)
        return Choices(
            len(order),
            lambda place: self.use_pair(order[place]),
            lambda best: self.use_pair(order[int(best)]),
        )

    def use_pair(self, index: int) -> None:
        """Use one of them, for the range that was observed.

        Raises:
            CalibrationError: none was.
        """
        if self._batches == 0:
            raise CalibrationError(f"{self._label()} was to use a knee before it had a range")
        self._pair = index
        rate, share = self._pairs[index]
        codes = log_codes(self.grid.bits, share, rate)
        extent = torch.tensor(self._high - self._low, dtype=torch.float64, device="cpu")
        knee, even_scale = self._scales(extent, rate, codes)
        self._logarithmic = codes
        self.logarithmic.fill_(codes)
        self.minimum.fill_(self._low)
        self.even_scale.data.fill_(float(even_scale))
        self._set_parameters(self.scale.new_tensor(float(knee)), self.zero_point)
        self.constrain_()

    def _scales(self, extent: Tensor, rate: float, codes: int) -> tuple[Tensor, Tensor]:
        """Knee and even step of a range of this extent: the last point is its upper end."""
        return rate * extent, (1 - rate) * extent / self._even(codes)

    def _even(self, codes: int) -> int:
        """Points above the knee."""
        return self.grid.levels - codes - 1

    def quantize(self, x: Tensor) -> Tensor:
        """Move `x` to its points; gradients reach `x` and both scales."""
        if not torch.is_grad_enabled():
            return hybrid_kernels.points(x, *self._in_use(), self._even(self._logarithmic))
        self._numbers.clear()
        moved: Tensor = _Hybrid.apply(  # type: ignore[no-untyped-call]
            x, self.scale, self.even_scale, self._make_numbers(), self._even(self._logarithmic)
        )
        return moved

    @torch.no_grad()
    def steps(self, x: Tensor) -> Tensor:
        """Steps from 0, whole."""
        numbers = self._in_use()
        above: Tensor = hybrid_kernels.steps(x, *numbers, self._even(self._logarithmic))
        steps: Tensor = above - numbers.zero
        return steps

    @property
    def step(self) -> Tensor:
        """What a step is worth."""
        step: Tensor = self._in_use().step
        return step

    @property
    def step_bounds(self) -> tuple[int, int]:
        """The smallest and the largest step."""
        whole = self.grid_in_use().whole_points()
        return min(0, int(whole[0])), max(0, int(whole[-1]))

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Places of the points of `x` in their order, int32."""
        points = self.grid_in_use().whole_points().to(x.device)
        return torch.searchsorted(points, self.steps(x).long()).to(torch.int32)

    def grid_in_use(self) -> HybridGrid:
        """Its points; see Quantizer."""
        return HybridGrid(self.grid, self._in_use(), self._logarithmic)

    def _in_use(self) -> HybridNumbers:
        self._require_calibration()
        return self._numbers.get(self._make_numbers, self.tensors)

    @torch.no_grad()
    def _make_numbers(self) -> HybridNumbers:
        # Whoever optimises calls constrain_(); this keeps a step in between from harm.
        knee, even_scale = (scale.detach().abs().clamp(min=EPS) for scale in self.learned())
        return hybrid_numbers(knee, even_scale, self.minimum, self.grid.bits, self._logarithmic)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._logarithmic = int(self.logarithmic)


class _Hybrid(torch.autograd.Function):
    """Quantization that keeps nothing but its input for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        knee: Tensor,
        even_scale: Tensor,
        numbers: HybridNumbers,
        even: int,
    ) -> Tensor:
        del knee, even_scale  # they get gradients; `numbers` are made of them
        ctx.save_for_backward(x, *numbers)
        ctx.even = even
        return hybrid_kernels.points(x, *numbers, even)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *numbers = ctx.saved_tensors
        given: tuple[Any, ...] = (x, gradients[0].contiguous(), *numbers, ctx.even)
        return *hybrid_kernels.gradients(*given), None, None
