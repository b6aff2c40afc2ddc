"""Which points of a crop are asked: a whole grid at once, or first where it is sparse.

The hierarchical way is TinySAM's (Shu et al., 2023, section 3.4): a sparse grid, then the points of
the dense grid at which no mask is confident. Written from the paper and from what the released
generator does; what its points do otherwise is in docs/everything.md. `share` is ours.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptq4sam.everything.crops import Crop, grid_of, point_grid
from ptq4sam.everything.filters import without_duplicates
from ptq4sam.everything.masks import FoundMasks
from ptq4sam.everything.settings import EverythingSettings, Hierarchical

Points = NDArray[np.float64]
"""[n, 2] (x, y) in pixels of a crop."""


class PointSource(Protocol):
    """The points of a crop, round after round; what a round finds may decide the next."""

    def ask(self, found: FoundMasks) -> Points:
        """The points of the next round; no point says that it is over.

        Args:
            found: the masks of all rounds so far that passed the filters, with duplicates.
        """

    def see(self, logits: Tensor) -> None:
        """Look at masks of this round that passed the filters: logits [n, height, width]."""


def points_of(crop: Crop, settings: EverythingSettings) -> PointSource:
    """Where the points of a crop come from, by the settings."""
    if settings.hierarchical is None:
        return _WholeGrid(grid_of(crop, settings))
    return _Hierarchy(crop, settings, settings.hierarchical)


class _WholeGrid:
    """All points in one round."""

    def __init__(self, points: Points) -> None:
        self._points = points

    def ask(self, found: FoundMasks) -> Points:
        asked, self._points = self._points, self._points[:0]
        return asked

    def see(self, logits: Tensor) -> None:
        pass


class _Hierarchy:
    """A sparse grid, then the points at which no mask is confident.

    Of the masks of all rounds only their highest logit at each waiting point is held, never a map.
    """

    def __init__(self, crop: Crop, settings: EverythingSettings, rule: Hierarchical) -> None:
        self._rule = rule
        self._box_nms_thresh = settings.box_nms_thresh
        self._size = crop.size
        per_side = settings.points_in_layer(crop.layer)
        parts = sparse_and_rest if rule.grid == "plain" else published_points
        self._asked, rest = parts(crop.size, per_side, rule.coarser)
        most = round(rule.share * (len(self._asked) + len(rest)))
        self._waiting = farthest_first(self._asked, rest, max(0, most - len(self._asked)))
        self._confidence = torch.full((len(self._waiting),), -torch.inf, dtype=torch.float64)
        self._rounds, self._distinct, self._in_vain = 0, 0, 0

    def ask(self, found: FoundMasks) -> Points:
        self._rounds += 1
        if self._rounds > 1:
            self._asked = self._next() if self._worthwhile(found) else self._waiting[:0]
        return self._asked

    def see(self, logits: Tensor) -> None:
        if not len(self._waiting):
            return
        pixels = torch.from_numpy(self._waiting.astype(np.int64)).to(logits.device)
        at_points = logits[:, pixels[:, 1], pixels[:, 0]]
        if self._rule.relative:
            # A mask without a pixel has no highest logit to be near to.
            highest = logits.flatten(1).amax(dim=1, keepdim=True)
            at_points = torch.where(highest > 0, at_points / highest, -torch.inf)
        best = at_points.amax(dim=0).double().cpu()
        self._confidence = torch.maximum(self._confidence, best)

    def _next(self) -> Points:
        """The unclear points, all or the most uncertain ones, which wait no longer."""
        unclear = self._confidence <= self._rule.high_score_thresh
        self._waiting = self._waiting[unclear.numpy()]
        self._confidence = self._confidence[unclear]
        at_once = self._rule.batch or len(self._waiting)
        order = self._confidence.argsort(stable=True)
        # The order of the grid within a batch, so that all at once are asked as published.
        first, rest = order[:at_once].sort().values, order[at_once:].sort().values
        asked: Points = self._waiting[first.numpy()]
        self._waiting, self._confidence = self._waiting[rest.numpy()], self._confidence[rest]
        return asked

    def _worthwhile(self, found: FoundMasks) -> bool:
        """Whether one of the last rounds found a mask that is like no other."""
        if self._rule.patience == 0:
            return True
        kept = without_duplicates(found.boxes, found.predicted_ious, self._box_nms_thresh)
        # The sparse grid is not counted: a picture of small things has none of its masks.
        if self._rounds > 2:
            self._in_vain = 0 if len(kept) > self._distinct else self._in_vain + 1
        self._distinct = len(kept)
        return self._in_vain < self._rule.patience


def farthest_first(chosen: Points, others: Points, count: int) -> Points:
    """Some of the other points, spread evenly: each the farthest from all before (Gonzalez, 1985).

    Args:
        chosen: points that are there already, at least one.
        others: points to choose among.
        count: how many; all others where they are not more.

    Returns:
        The points in the order of `others`.
    """
    if count >= len(others):
        return others
    taken = np.zeros(len(others), np.bool_)
    nearest = np.full(len(others), np.inf)
    for point in chosen:
        nearest = np.minimum(nearest, ((others - point) ** 2).sum(axis=1))
    for _ in range(count):
        farthest = int(nearest.argmax())
        taken[farthest] = True
        nearest = np.minimum(nearest, ((others - others[farthest]) ** 2).sum(axis=1))
    return others[taken]


def sparse_and_rest(size: tuple[int, int], per_side: int, coarser: int) -> tuple[Points, Points]:
    """The plain grid in two parts: a point in each block of `coarser` x `coarser`, and the others.

    Together they are `point_grid(per_side)`, whatever the numbers.

    Args:
        size: (height, width) of the crop.
        per_side: points of the grid along a side.
        coarser: how many of them are a side of a block; those at the end may be smaller.
    """
    starts = np.arange(0, per_side, coarser)
    middles = (starts + np.minimum(starts + coarser, per_side) - 1) // 2
    chosen = np.isin(np.arange(per_side), middles)
    sparse = (chosen[:, None] & chosen[None]).ravel()
    points = point_grid(per_side) * np.array(size[::-1], np.float64)
    return points[sparse], points[~sparse]


def published_points(size: tuple[int, int], per_side: int, coarser: int) -> tuple[Points, Points]:
    """The points of TinySAM's release: a sparse grid of its own, and steps in whole pixels from it.

    A step is the whole number of pixels in a cell of the dense grid, so that the points are those
    of no regular grid, lie half a cell off the plain one's, and end before the right and bottom.
    Where a cell has no whole pixel a step is one pixel.

    Args:
        size: (height, width) of the crop.
        per_side: points of the dense grid along a side.
        coarser: the sparse grid has so many times fewer.
    """
    sides = np.array(size[::-1], np.float64)
    sparse = point_grid(max(1, per_side // coarser)) * sides
    step = np.maximum(1, np.array(size[::-1]) // per_side)
    along = np.arange(coarser) - (coarser - 1) // 2
    x, y = np.meshgrid(along, along)
    away = np.stack([x, y], axis=-1).reshape(-1, 2)
    away = away[away.any(axis=1)]
    rest = (sparse[:, None] + away * step).reshape(-1, 2)
    rest = rest[((rest >= 0) & (rest < sides)).all(axis=1)]
    # Of a tiny picture the steps of two points may meet.
    _, first = np.unique(np.concatenate([sparse, rest]), axis=0, return_index=True)
    return sparse, rest[np.sort(first[first >= len(sparse)]) - len(sparse)]
