"""Searches for the range whose fake quantization errs least."""

from __future__ import annotations

import enum
from collections.abc import Iterator

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

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


def grid_search(rows: Tensor, grid: Grid, side: Side, per_channel: bool) -> tuple[Tensor, Tensor]:
    """The best of a fixed set of ranges, by `range_loss`; the first of equals.

    On one side of zero or on a symmetric grid the set is WIDTHS thresholds up to the largest
    magnitude; else WIDTHS widths up to that of the data, each at every zero point.

    Args:
        rows: [channels, elements].
        grid: the codes ranges are divided into.
        side: where the data is.
        per_channel: rows are channels, some of which may be on one side of zero.

    Returns:
        Lower and upper ends, [channels] each.
    """
    if side is not Side.BOTH or grid.symmetric:
        return _search_thresholds(rows, grid, side)
    low, high = torch.aminmax(rows, dim=1)
    if per_channel:
        low, high = low.clamp(max=0), high.clamp(min=0)
    at_once = max(1, _BOUNDS // (WIDTHS * grid.levels))
    kernel = _clip_kernel(grid.levels, rows.device)
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
# bound is not above the loss of the most promising one are evaluated as they would have been.
_BOUNDS = 2**23
"""Bounds held at once."""
_SLACK = 1e-3
"""Relative error granted to a bound, for rounding."""


def _search_widths(
    rows: Tensor, extent: Tensor, grid: Grid, kernel: Tensor
) -> tuple[Tensor, Tensor]:
    levels = grid.levels
    widths = torch.stack([extent / WIDTHS * step for step in range(1, WIDTHS + 1)], dim=1)
    bounds = torch.empty(rows.shape[0], WIDTHS, levels, device=rows.device)
    for index in range(WIDTHS):
        step = (widths[:, index] / grid.qmax).clamp(min=MIN_SCALE)
        bounds[:, index] = _lower_bounds(rows, step, levels, kernel)
    bounds = bounds.flatten(1)

    def ends(row: Tensor, candidate: Tensor) -> tuple[Tensor, Tensor]:
        width = widths[row, candidate // levels]
        shift = (candidate % levels) * (width / grid.qmax)
        return -shift, width - shift

    every_row = torch.arange(rows.shape[0], device=rows.device)
    promising = bounds.argmin(dim=1)
    limit = range_loss(rows, *ends(every_row, promising), grid)
    # Data that lies on a grid has no error but that of float32 itself.
    noise = (16 * torch.finfo(torch.float32).eps * rows.abs().amax(dim=1).double()).pow(POWER)
    limit = limit * (1 + _SLACK) + noise
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


def _clip_kernel(levels: int, device: torch.device) -> Tensor:
    """Weights of a bin's moments in a lower bound of the error of clipping it.

    A value t steps from the centre of a bin that is m >= 1 steps above a range's end u costs
    (m + t)^p. With 2 < p < 3 its expansion to second order is a lower bound for t >= 0, and for
    -1/2 <= t < 0 as soon as the largest third-order term, |t| <= 1/2, is taken off.

    Returns:
        [3 * reach, levels]: for the number of values, the sum of t and that of t^2, in bins
        1 .. reach = 2 levels, and for ends 0 .. levels - 1; zero where a bin is not above.
    """
    bins = torch.arange(1, 2 * levels + 1, dtype=torch.float64, device=device)
    distance = bins[:, None] - torch.arange(levels, device=device)
    above = distance > 0
    distance = distance.clamp(min=1)
    second = POWER * (POWER - 1) / 2
    third = second * (POWER - 2) / 3
    curvature = second * distance.pow(POWER - 2) - third / 2 * (distance - 0.5).pow(POWER - 3)
    weights = (distance.pow(POWER), POWER * distance.pow(POWER - 1), curvature)
    return torch.cat([weight * above for weight in weights]).float()


def _lower_bounds(rows: Tensor, step: Tensor, levels: int, kernel: Tensor) -> Tensor:
    """Lower bounds of the loss of ranges of (levels - 1) steps at each zero point.

    Args:
        rows: [r, n].
        step: [r] positive.
        levels: how many codes there are.
        kernel: of `_clip_kernel`.

    Returns:
        [r, levels].
    """
    reach = 2 * levels
    bins = 2 * reach + 1
    channels, count = rows.shape
    first_bin = torch.arange(channels, device=rows.device)[:, None] * bins + reach
    sums = torch.zeros(4, channels * bins, dtype=torch.float64, device=rows.device)
    for piece in pieces(rows):
        offset = piece / step[:, None]
        code = offset.round().clamp_(-reach, reach)
        offset = offset.sub_(code).flatten()
        index = (code.long() + first_bin).flatten()
        size = offset.abs()
        moments = (torch.ones_like(size), offset, size.square(), size.pow(POWER))
        for total, moment in zip(sums, moments, strict=True):
            total.scatter_add_(0, index, moment.double())
    number, shift, spread, error = sums.view(4, channels, bins)
    above = torch.cat([number, shift, spread], dim=1).view(channels, 3, bins)
    below = torch.cat([number, -shift, spread], dim=1).view(channels, 3, bins).flip(2)
    clipped = torch.cat([above, below])[:, :, reach + 1 :].flatten(1).float() @ kernel
    # Codes -z .. levels-1-z are inside at zero point z; its upper end is levels-1-z, its lower -z.
    inside = error[:, reach - levels + 1 : reach + levels].cumsum(dim=1)
    inside = torch.cat([torch.zeros_like(inside[:, :1]), inside], dim=1)
    inside = (inside[:, levels:] - inside[:, :-levels]).flip(1)
    loss = inside + clipped[:channels].flip(1) + clipped[channels:]
    return (loss * step[:, None].double().pow(POWER) / count).float()


def fast_search(rows: Tensor, grid: Grid, side: Side, per_channel: bool) -> tuple[Tensor, Tensor]:
    """A good range by bounded scalar minimisation of `range_loss`, cut to the data's own.

    On one side of zero or on a symmetric grid over the threshold; else over the width, and for each
    width over the shift.

    Args:
        rows: [channels, elements].
        grid: the codes ranges are divided into.
        side: where the data is.
        per_channel: rows are channels, some of which may be on one side of zero.

    Returns:
        Lower and upper ends, [channels] each.
    """
    low, high = torch.aminmax(rows, dim=1)
    if per_channel:
        low, high = low.clamp(max=0), high.clamp(min=0)
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
    return float(minimize_scalar(loss, bounds=bounds, method="bounded").x)


def _minimize_width(row: Tensor, grid: Grid, extent: float) -> tuple[float, float]:
    """Width and shift of the range [-shift, width - shift]."""
    if extent == 0:
        return 0.0, 0.0
    # The loss is constant between the shifts at which the zero point changes. It has to be exactly
    # so, or the minimisation follows rounding errors: ends in float64, steps in float32. What is
    # known then need not be computed again.
    known: dict[tuple[float, float], float] = {}

    def loss(width: float, shift: float) -> float:
        ends = torch.tensor([[-shift], [width - shift]], dtype=torch.float64)
        scale, zero_point = grid.affine_parameters(*ends)
        parameters = (scale.to(row), zero_point.to(row))
        key = (float(parameters[0]), float(zero_point))
        if key not in known:
            known[key] = float(quantization_loss(row, *parameters, grid))
        return known[key]

    def best_shift(width: float) -> tuple[float, float]:
        step = width / (grid.qmax - grid.qmin)
        found = minimize_scalar(
            lambda shift: loss(width, shift),
            bounds=(step * grid.qmin, step * grid.qmax),
            method="bounded",
        )
        return float(found.x), float(found.fun)

    bounds = (min(0.1, 0.01 * extent), extent)
    found = minimize_scalar(lambda width: best_shift(width)[1], bounds=bounds, method="bounded")
    width = float(found.x)
    return width, best_shift(width)[0]
