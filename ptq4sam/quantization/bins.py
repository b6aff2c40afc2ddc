"""Sums of values by the bin that they are in, with the same bits at every call."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

_TOGETHER = 2**12
"""Values of a row that one product adds: of many small products a GPU makes many at once."""
_ELEMENTS = 2**26
"""Elements of the matrices that are multiplied at once."""


def add_to_bins_(sums: Tensor, values: Sequence[Tensor], codes: Tensor) -> None:
    """Add several values of each place to the sums of its bin, row by row.

    A CPU adds one after the other. Threads of a GPU would add in any order, and wait for each other
    where most values are in a few bins: there they are added by matrix products.

    Args:
        sums: float64 [r, len(values), bins], contiguous.
        values: float32 [r, n] each.
        codes: whole numbers [r, n], the bin of each, counted from the one in the middle.
    """
    if _adds_in_order(sums.device):
        _add_one_by_one_(sums, values, codes)
        return
    rows, columns = codes.shape
    kinds, bins = sums.shape[1:]
    together = min(_TOGETHER, columns)
    # Zeros, which may be added to any bin, fill the last product up.
    codes, *filled = (F.pad(x, (0, -columns % together)) for x in (codes, *values))
    digits = math.isqrt(bins - 1) + 1
    at_once = max(1, _ELEMENTS // (together * digits * (kinds + 1)))
    parts = zip(
        torch.split((codes.long() + bins // 2).reshape(-1, together), at_once),
        torch.split(torch.stack(filled, -1).reshape(-1, together, kinds), at_once),
        strict=True,
    )
    found = torch.cat([_by_products(each, place, digits) for place, each in parts])
    sums += found.reshape(rows, -1, kinds, digits**2).sum(1)[..., :bins]


def _adds_in_order(device: torch.device) -> bool:
    """Whether `scatter_add_` adds one value after the other there."""
    return device.type == "cpu"


def _add_one_by_one_(sums: Tensor, values: Sequence[Tensor], codes: Tensor) -> None:
    rows, kinds, bins = sums.shape
    middle = torch.arange(rows, device=sums.device)[:, None] * (kinds * bins) + bins // 2
    index, flat = (codes.long() + middle).flatten(), sums.view(-1)
    for kind, each in enumerate(values):
        flat.scatter_add_(0, index + kind * bins, each.flatten().double())


def _by_products(values: Tensor, places: Tensor, digits: int) -> Tensor:
    """Sums of values [p, n, k] at places [p, n] of two digits: float64 [p, k, digits squared].

    A bin is a row and a column of a matrix, so that no place needs a number for each bin.
    """
    every = torch.arange(digits, device=places.device)
    row = (places // digits).unsqueeze(1) == every[:, None]
    column = ((places % digits).unsqueeze(-1) == every).unsqueeze(-2)
    sums = row.double() @ (values.double().unsqueeze(-1) * column).flatten(2)
    return sums.reshape(len(sums), digits, -1, digits).transpose(1, 2).flatten(2)
