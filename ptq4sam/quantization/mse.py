"""Searches for the range whose fake quantization errs least."""

from __future__ import annotations

import enum
from collections.abc import Iterator

import numpy as np
import scipy
import torch
from torch import Tensor

from ptq4sam.quantization.bins import add_to_bins_
from ptq4sam.quantization.grid import MIN_SCALE, Grid

POWER = 2.4
"""Exponent of the error that ranges are searched by (as in QDrop)."""
WIDTHS = 100
"""How many widths a grid search tries."""
MAX_SEARCH_BITS = 10
"""Most bits of an asymmetric grid search; its work grows with 4^bits."""


class Side(enum.Enum):
    """On which side of zero all values are."""

    POSITIVE = "pos"
    NEGATIVE = "neg"
    BOTH = "no"


def side_of(values: Tensor) -> Side:
    """On which side of zero all values are."""
    low, high = torch.aminmax(values)
    if low >= 0:
        return Side.POSITIVE
    return Side.NEGATIVE if high <= 0 else Side.BOTH


def _ends_with_zero(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each row, or 0 where a row is on one side of it.

    Every range that a grid can have contains 0. Of data far from it a range as wide as the data
    alone would miss most.
    """
    low, high = torch.aminmax(rows, dim=1)
    return low.clamp(max=0), high.clamp(min=0)


def pieces(rows: Tensor) -> Iterator[Tensor]:
    """Views [r, columns] of [r, n] rows, small enough to stay in a cache."""
    elements = 2**18 if rows.device.type == "cpu" else 2**24
    yield from torch.split(rows, max(1, elements // max(1, rows.shape[0])), dim=1)


def range_loss(
    rows: Tensor, minimum: Tensor, maximum: Tensor, grid: Grid, power: float = POWER
) -> Tensor:
    """Mean |q(x) - x|^power of each row quantized in its range.

    Args:
        rows: [r, n].
        minimum: [r] lower ends.
        maximum: [r] upper ends.
        grid: the codes the ranges are divided into.
        power: exponent of the error.

    Returns:
        [r] float64.
    """
    return quantization_loss(rows, *grid.affine_parameters(minimum, maximum), grid, power)


def quantization_loss(
    rows: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, power: float = POWER
) -> Tensor:
    """Mean |q(x) - x|^power of each row of [r, n] with scales and zero points [r]; [r] float64."""
    scale, zero_point = scale[:, None], zero_point[:, None]
    total = torch.zeros(rows.shape[0], dtype=torch.float64, device=rows.device)
    for piece in pieces(rows):
        error = (piece / scale).round_().add_(zero_point).clamp_(grid.qmin, grid.qmax)
        error = error.sub_(zero_point).mul_(scale).sub_(piece).abs_().pow_(power)
        total += error.sum(dim=1, dtype=torch.float64)
    return total / rows.shape[1]


def nearly_powered(error: Tensor) -> Tensor:
    """|error|^POWER of a float32 tensor, to 1e-6 of itself, in a third of the time of torch's.

    For bounds and for searches that stop early. The ends of a minimisation over plateaus depend on
    the last bit of a loss, so that others take torch's.
    """
    size = error.abs()
    return size.log2().mul_(POWER - 2).exp2_().mul_(size).mul_(size)


def grid_search(rows: Tensor, grid: Grid, side: Side) -> tuple[Tensor, Tensor]:
    """The best of a fixed set of ranges, by `range_loss`; the first of equals.

    On one side of zero or on a symmetric grid the set is WIDTHS thresholds up to the largest
    magnitude; else WIDTHS widths up to that of the data and 0, each at every zero point.

    Args:
        rows: [channels, elements].
        grid: the codes ranges are divided into.
        side: where the data is; with `Side.BOTH` single rows may be on one.

    Returns:
        Lower and upper ends, [channels] each.
    """
    if side is not Side.BOTH or grid.symmetric:
        return _search_thresholds(rows, grid, side)
    low, high = _ends_with_zero(rows)
    at_once = max(1, _BOUNDS // (WIDTHS * grid.levels))
    kernel = _bound_kernel(grid.levels, rows.device)
    found = [
        _search_widths(part, extent, grid, kernel)
        for part, extent in zip(
            torch.split(rows, at_once), torch.split(high - low, at_once), strict=True
        )
    ]
    return torch.cat([low for low, _ in found]), torch.cat([high for _, high in found])


def _threshold_range(threshold: Tensor, side: Side) -> tuple[Tensor, Tensor]:
    zero = torch.zeros_like(threshold)
    low = zero if side is Side.POSITIVE else -threshold
    high = zero if side is Side.NEGATIVE else threshold
    return low, high


def _search_thresholds(rows: Tensor, grid: Grid, side: Side) -> tuple[Tensor, Tensor]:
    largest = rows.abs().amax(dim=1)
    best = torch.full(largest.shape, torch.inf, dtype=torch.float64, device=rows.device)
    best_threshold = largest
    for step in range(1, WIDTHS + 1):
        threshold = largest / WIDTHS * step
        loss = range_loss(rows, *_threshold_range(threshold, side), grid)
        best_threshold = torch.where(loss < best, threshold, best_threshold)
        best = torch.minimum(best, loss)
    return _threshold_range(best_threshold, side)


# The two-dimensional search tries WIDTHS * 2^bits ranges. Evaluating them all is not needed: a
# lower bound of each loss comes from moments of the data in bins of one step, and only ranges whose
# bound is not above the loss of the most promising one are evaluated as they would have been. Nor
# are bounds of all widths needed: of two ranges with one zero point the wider one contains the
# narrower one, which therefore clips no less. Once clipping alone costs too much at every zero
# point, no narrower range can be the best.
_BOUNDS = 2**23
"""Bounds held at once."""
_SLACK = 1e-3
"""Relative error granted to a bound, for rounding."""
_LOOK_EVERY = 8
"""Widths between two looks at whether narrower ones can be good."""


def _search_widths(
    rows: Tensor, extent: Tensor, grid: Grid, kernel: Tensor
) -> tuple[Tensor, Tensor]:
    levels = grid.levels
    widths = torch.stack([extent / WIDTHS * step for step in range(1, WIDTHS + 1)], dim=1)
    every_row = torch.arange(rows.shape[0], device=rows.device)
    # Data that lies on a grid has no error but that of float32 itself.
    noise = (16 * torch.finfo(torch.float32).eps * rows.abs().amax(dim=1).double()).pow(POWER)

    def ends(row: Tensor, candidate: Tensor) -> tuple[Tensor, Tensor]:
        width = widths[row, candidate // levels]
        shift = (candidate % levels) * (width / grid.qmax)
        return -shift, width - shift

    def most_promising() -> tuple[Tensor, Tensor]:
        """Candidates of the lowest bounds, and what the best range loses at most."""
        promising = bounds.flatten(1).argmin(dim=1)
        loss = range_loss(rows, *ends(every_row, promising), grid)
        return promising, loss * (1 + _SLACK) + noise

    bounds = torch.full((rows.shape[0], WIDTHS, levels), torch.inf, device=rows.device)
    for index in reversed(range(WIDTHS)):
        step = (widths[:, index] / grid.qmax).clamp(min=MIN_SCALE)
        clipping, bounds[:, index] = _lower_bounds(rows, step, kernel)
        if index % _LOOK_EVERY == 0 and bool((clipping.amin(dim=1) > most_promising()[1]).all()):
            break
    promising, limit = most_promising()
    bounds = bounds.flatten(1)
    eligible = bounds <= limit[:, None]
    eligible[every_row, promising] = True
    row, candidate = eligible.nonzero(as_tuple=True)
    low, high = ends(row, candidate)
    at_once = max(1, 2**22 // rows.shape[1])
    parts = zip(*(torch.split(tensor, at_once) for tensor in (row, low, high)), strict=True)
    loss = torch.cat(
        # A single row may be too large to be copied for each range.
        [
            range_loss(rows[r] if len(rows) > 1 else rows.expand(len(r), -1), start, end, grid)
            for r, start, end in parts
        ]
    )
    # Candidates come in order, so that stable sorting leaves the first of equals in front.
    order = loss.argsort(stable=True)
    order = order[row[order].argsort(stable=True)]
    counts = torch.bincount(row, minlength=rows.shape[0])
    first = order[counts.cumsum(0) - counts]
    return low[first], high[first]


def _bound_kernel(levels: int, device: torch.device) -> Tensor:
    """Weights of a bin's moments in a lower bound of the error of all its values.

    A value t steps from the centre of a bin that is m >= 1 steps outside of a range costs
    (m + t)^p, t being positive away from the range. With 2 < p < 3 its expansion to second order is
    a lower bound for t >= 0, and for -1/2 <= t < 0 as soon as the largest third-order term,
    |t| <= 1/2, is taken off. Within the range it costs |t|^p.

    Returns:
        [4, bins, levels]: for the number of values, the sums of t, t^2 and |t|^p, in the bins
        -2 levels .. 2 levels, and for zero points 0 .. levels - 1.
    """
    bins = torch.arange(-2 * levels, 2 * levels + 1, dtype=torch.float64, device=device)[:, None]
    lowest = -torch.arange(levels, dtype=torch.float64, device=device)
    side = (bins > lowest + levels - 1).double() - (bins < lowest).double()
    distance = torch.where(side > 0, bins - lowest - levels + 1, lowest - bins).clamp(min=1)
    second = POWER * (POWER - 1) / 2
    third = second * (POWER - 2) / 3
    curvature = second * distance.pow(POWER - 2) - third / 2 * (distance - 0.5).pow(POWER - 3)
    outside = side.abs()
    weights = (
        distance.pow(POWER) * outside,
        POWER * distance.pow(POWER - 1) * side,
        curvature * outside,
        1 - outside,
    )
    return torch.stack(weights).float()


def _lower_bounds(rows: Tensor, step: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Lower bounds of what ranges of (levels - 1) steps lose at each zero point.

    Args:
        rows: [r, n].
        step: [r] positive.
        kernel: of `_bound_kernel`.

    Returns:
        Of the loss by clipping alone, and of the whole loss; [r, levels] each.
    """
    channels, count = rows.shape
    # Bins that no row reaches have no part in the product, which takes most of the time.
    farthest = float((rows.abs().amax(dim=1) / step).max())
    half = kernel.shape[1] // 2
    reach = min(half, int(min(farthest, half)) + 1)
    bins = 2 * reach + 1
    sums = torch.zeros(channels, 4, bins, dtype=torch.float64, device=rows.device)
    for piece in pieces(rows):
        offset = piece / step[:, None]
        code = offset.round().clamp_(-reach, reach)
        offset = offset.sub_(code)
        moments = (torch.ones_like(offset), offset, offset.square(), nearly_powered(offset))
        add_to_bins_(sums, moments, code)
    sums = sums.flatten(1).float()
    of_clipping, of_rounding = sums[:, : 3 * bins], sums[:, 3 * bins :]
    weights = kernel.narrow(1, half - reach, bins)
    clipping = of_clipping @ weights[:3].flatten(0, 1)
    whole = clipping + of_rounding @ weights[3]
    unit = step[:, None].double().pow(POWER) / count
    return (clipping * unit).float(), (whole * unit).float()


def fast_search(rows: Tensor, grid: Grid, side: Side) -> tuple[Tensor, Tensor]:
    """A good range by bounded scalar minimisation of `range_loss`, cut to that of the data and 0.

    On one side of zero or on a symmetric grid over the threshold; else over the width, and for each
    width over the shift.

    Args:
        rows: [channels, elements].
        grid: the codes ranges are divided into.
        side: where the data is; with `Side.BOTH` single rows may be on one.

    Returns:
        Lower and upper ends, [channels] each.
    """
    low, high = _ends_with_zero(rows)
    if side is not Side.BOTH or grid.symmetric:
        largest = torch.maximum(low.abs(), high.abs()).tolist()
        thresholds = [
            _minimize_threshold(row, grid, side, limit)
            for row, limit in zip(torch.split(rows, 1), largest, strict=True)
        ]
        return _threshold_range(low.new_tensor(thresholds), side)
    found = [
        _minimize_width(row, grid, extent)
        for row, extent in zip(torch.split(rows, 1), (high - low).tolist(), strict=True)
    ]
    width, shift = low.new_tensor(found).unbind(1)
    return torch.maximum(-shift, low), torch.minimum(width - shift, high)


def _minimize_threshold(row: Tensor, grid: Grid, side: Side, largest: float) -> float:
    if largest == 0:
        return 0.0

    def loss(threshold: float) -> float:
        ends = _threshold_range(row.new_tensor([threshold]), side)
        return float(range_loss(row, *ends, grid))

    bounds = (min(0.1, 0.01 * largest), largest)
    return float(scipy.optimize.minimize_scalar(loss, bounds=bounds, method="bounded").x)


def _minimize_width(row: Tensor, grid: Grid, extent: float) -> tuple[float, float]:
    """Width and shift of the range [-shift, width - shift]."""
    if extent == 0:
        return 0.0, 0.0
    # The loss is constant between the shifts at which the zero point changes. It has to be exactly
    # so, or the minimisation follows rounding errors: ends in float64, steps in float32. What is
    # known then need not be computed again.
    known: dict[tuple[float, float], float] = {}

    def loss(width: float, shift: float) -> float:
        scale, zero_point = grid.affine_numbers(-shift, width - shift)
        key = (float(np.float32(scale)), zero_point)
        if key not in known:
            steps, zero_points = row.new_tensor([key]).unbind(1)
            known[key] = float(quantization_loss(row, steps, zero_points, grid))
        return known[key]

    def best_shift(width: float) -> tuple[float, float]:
        step = width / (grid.qmax - grid.qmin)
        found = scipy.optimize.minimize_scalar(
            lambda shift: loss(width, shift),
            bounds=(step * grid.qmin, step * grid.qmax),
            method="bounded",
        )
        return float(found.x), float(found.fun)

    bounds = (min(0.1, 0.01 * extent), extent)
    found = scipy.optimize.minimize_scalar(
        lambda width: best_shift(width)[1], bounds=bounds, method="bounded"
    )
    width = float(found.x)
    return width, best_shift(width)[0]
