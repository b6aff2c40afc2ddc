"""Learned rounding of weights (AdaRound, Nagel et al. 2020)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ptq4sam.errors import CalibrationError
from ptq4sam.quantization.affine import FixedQuantizer
from ptq4sam.quantization.division import divided
from ptq4sam.quantization.fused import fused, fused_exactly
from ptq4sam.quantization.grid import Grid, along_channels, in_products, precise
from ptq4sam.quantization.hard_numbers import near_steps

# The sigmoid is stretched to (-0.1, 1.1) and cut, so that 0 and 1 are reached (AdaRound, eq. 23).
_STRETCH = 1.2
_OFFSET = -0.1


def _share(alpha: Tensor) -> Tensor:
    return (_STRETCH * torch.sigmoid(alpha) + _OFFSET).clamp(0, 1)


def _share_slope(alpha: Tensor) -> Tensor:
    """Derivative of `_share`: 0 where it is cut."""
    sigmoid = torch.sigmoid(alpha)
    share = _STRETCH * sigmoid + _OFFSET
    return _STRETCH * sigmoid * (1 - sigmoid) * share.eq(share.clamp(0, 1)).to(alpha.dtype)


@fused
def _with_regularizer_gradient(
    gradient: Tensor, alpha: Tensor, beta: Tensor, weight: Tensor
) -> Tensor:
    distance = 2 * _share(alpha) - 1
    # Three times as fast on a CPU as a power; that of 0 is 0 here too, by way of -inf.
    power = torch.exp2((beta - 1) * distance.abs().log2())
    return gradient - weight * 2 * beta * power * distance.sign() * _share_slope(alpha)


def _hard_weights(x: Tensor, alpha: Tensor, *others: Any) -> Iterator[tuple[Any, ...]]:
    # Not with shares between 0 and 1: exponentials are each compiler's own.
    sure = torch.where(alpha >= 0, 50.0, -50.0).to(alpha.dtype)
    yield from near_steps(scale_at=2)(x, sure, *others)


@fused_exactly(_hard_weights)
def _soften(
    x: Tensor,
    alpha: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    like: Tensor,
    qmin: int,
    qmax: int,
) -> Tensor:
    codes = divided(precise(x), scale).floor() + _share(alpha) + zero_point
    return ((codes.clamp(qmin, qmax) - zero_point) * scale).to(like.dtype)


@fused
def _soften_gradient(
    x: Tensor,
    alpha: Tensor,
    gradient: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
) -> Tensor:
    codes = divided(precise(x), scale).floor() + _share(alpha) + zero_point
    inside = codes.eq(codes.clamp(qmin, qmax)).to(alpha.dtype)
    return inside * _share_slope(alpha) * scale * gradient


class _Soften(torch.autograd.Function):
    """Move weights between the two neighbours on their grid; only alpha gets a gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, alpha: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid
    ) -> Tensor:
        ctx.save_for_backward(x, alpha, scale, zero_point)
        ctx.grid = grid
        return _soften(x, alpha, scale, zero_point, in_products(x), grid.qmin, grid.qmax)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, alpha, scale, zero_point = ctx.saved_tensors
        (gradient,) = gradients
        parameters = (scale, zero_point, ctx.grid.qmin, ctx.grid.qmax)
        return None, _soften_gradient(x, alpha, gradient, *parameters), None, None, None


class AdaRoundQuantizer(FixedQuantizer):
    """Rounds each weight up or down as learned; the scale stays what calibration made it.

    A saved quantizer with learned rounding is read as "hard".

    Attributes:
        rounding: "nearest"; "soft" while learning, between the two neighbours; "hard" afterwards,
            up where alpha >= 0.
        alpha: one variable a weight, in its shape; empty before learning.
    """

    learns_rounding = True

    def __init__(
        self, grid: Grid, observer: str = "MinMaxObserver", channel_axis: int | None = None
    ) -> None:
        super().__init__(grid, observer, channel_axis)
        self.rounding: Literal["nearest", "soft", "hard"] = "nearest"
        self.alpha = nn.Parameter(torch.empty(0), requires_grad=False)

    @property
    def has_learned(self) -> bool:
        """Whether there are rounding variables."""
        return self.alpha.numel() > 0

    @torch.no_grad()
    def begin_learning(self, weight: Tensor) -> None:
        """Start from rounding variables that leave `weight` where it is within its grid.

        Raises:
            CalibrationError: the quantizer was not calibrated.
        """
        self._require_calibration()
        weight = self.corrected(weight)
        ratio = precise(weight) / along_channels(self.scale, weight.shape, self.channel_axis)
        fraction = ratio - ratio.floor()
        self.alpha = nn.Parameter(-torch.log(_STRETCH / (fraction - _OFFSET) - 1))
        self.rounding = "soft"

    def finish_learning(self) -> None:
        """Round hard from now on.

        Raises:
            CalibrationError: nothing was learned.
        """
        self._require_alpha()
        self.rounding = "hard"

    def stay_soft(self) -> None:
        """Leave the weight between its points, where something was learned."""
        if self.has_learned:
            self.rounding = "soft"

    def derived(self) -> dict[str, Tensor]:
        """No rounding variables: a frozen weight is on its grid."""
        return {**super().derived(), "alpha": torch.empty(0, device="cpu")}

    def freeze(self) -> None:
        """Drop the rounding variables too."""
        super().freeze()
        self.alpha = nn.Parameter(self.alpha.new_empty(0), requires_grad=False)
        self.rounding = "nearest"

    @property
    def is_whole(self) -> bool:
        """Not while it is soft."""
        return super().is_whole and self.rounding != "soft"

    def rounding_share(self) -> Tensor:
        """How far each weight goes up, h(alpha) in [0, 1], in the shape of the weight."""
        self._require_alpha()
        return _share(self.alpha)

    @torch.no_grad()
    def add_regularizer_gradient_(self, weight: Tensor, beta: Tensor) -> None:
        """Add the gradient of the regulariser to that of alpha.

        It is weight * sum(1 - |2h - 1|^beta), which draws h to 0 or 1 (AdaRound, eq. 24). No step
        needs its value.

        Args:
            weight: [] of alpha's type on its device: by numbers each step would compile anew.
            beta: [], the same.
        """
        self._require_alpha()
        alpha = self.alpha.detach()
        gradient = torch.zeros_like(alpha) if self.alpha.grad is None else self.alpha.grad
        self.alpha.grad = _with_regularizer_gradient(gradient, alpha, beta, weight)

    def quantize(self, x: Tensor) -> Tensor:
        """Move the weight `x` to the grid (while "soft": between its points)."""
        if self.rounding == "nearest":
            return super().quantize(x)
        scale = along_channels(self.scale, x.shape, self.channel_axis)
        zero_point = along_channels(self.zero_point, x.shape, self.channel_axis)
        if self.rounding == "soft":
            self._require_alpha()
            softened: Tensor = _Soften.apply(  # type: ignore[no-untyped-call]
                x, self.alpha, scale, zero_point, self.grid
            )
            return softened
        return ((self._learned_codes(x, self._up()) - zero_point) * scale).to(x.dtype)

    @torch.no_grad()
    def steps(self, x: Tensor) -> Tensor:
        """Codes of the weight `x` less the zero point."""
        if self.rounding == "nearest":
            return super().steps(x)
        zero_point = along_channels(self.zero_point, x.shape, self.channel_axis)
        return self._of_groups(self._learned_codes(x, self._up()) - zero_point)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Integer codes of the weight `x`, int32; those of hard rounding while it is soft."""
        if self.rounding == "nearest":
            return super().codes(x)
        return self._learned_codes(x, self._up()).to(torch.int32)

    def _up(self) -> Tensor:
        self._require_alpha()
        return (self.alpha.detach() >= 0).to(self.alpha.dtype)

    def _learned_codes(self, x: Tensor, up: Tensor) -> Tensor:
        scale = along_channels(self.scale, x.shape, self.channel_axis)
        zero_point = along_channels(self.zero_point, x.shape, self.channel_axis)
        codes = (precise(x) / scale).floor() + up + zero_point
        return codes.clamp(self.grid.qmin, self.grid.qmax)

    def _require_alpha(self) -> None:
        if not self.has_learned:
            raise CalibrationError(
                f"{self._label()} was asked for learned rounding but has learned none: call "
                "begin_learning first"
            )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.rounding = "hard" if self.has_learned else "nearest"
