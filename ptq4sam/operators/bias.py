"""What positions add to the logits of an attention: of a float query, or of whole steps of it."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ptq4sam.operators.base import QUERY, Work
from ptq4sam.quantization.portable import (
    FIXED,
    LARGEST_DIGIT,
    X,
    apart,
    digits,
    of_digits,
    power_of_two,
)
from ptq4sam.quantization.whole import operand

Digits = tuple[Tensor, Tensor, Tensor]
Terms = tuple[Tensor] | tuple[Tensor, Tensor]


class PositionBias(Protocol):
    """Gives logits to add, for some rows of queries."""

    @property
    def columns(self) -> int:
        """Queries in a row, of which an attention takes whole ones at once."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What it follows from."""

    @property
    def key(self) -> Hashable:
        """What else it follows from."""

    def of_query(self, query: Tensor, heads: slice, first: int, last: int) -> Tensor:
        """Logits of rows first to last of some heads of a query [batch, heads, n, head_dim].

        Returns:
            [batch or 1, heads, n, keys].
        """

    def of_steps(
        self, steps: Tensor, step: Tensor, largest: int, heads: slice, first: int, last: int
    ) -> Terms:
        """The same for a query of whole steps, the same bits everywhere.

        Args:
            steps: the query.
            step: what one is worth, [], or [heads, 1, 1] of these heads.
            largest: of them, absolute.
            heads: which ones the query has.
            first: row.
            last: row behind.

        Returns:
            Terms to be added to each other, then to logits: one [batch or 1, heads, n, keys], or
            two [batch, heads, n, rows, 1] and [batch, heads, n, 1, columns] of keys in a grid.
        """

    def work(self, query: Tensor) -> Iterator[Work]:
        """What it multiplies for a whole query."""


class TableBias:
    """A logit for each head, query and key, whatever the query is.

    Args:
        table: [heads, queries, keys].
    """

    columns, key = 1, None

    def __init__(self, table: Tensor) -> None:
        self.tensors = (table,)

    def of_query(self, query: Tensor, heads: slice, first: int, last: int) -> Tensor:
        """See PositionBias."""
        return self.tensors[0][None, heads, first:last]

    def of_steps(
        self, steps: Tensor, step: Tensor, largest: int, heads: slice, first: int, last: int
    ) -> Terms:
        """See PositionBias."""
        return (self.of_query(steps, heads, first, last),)

    def work(self, query: Tensor) -> Iterator[Work]:
        """Nothing is multiplied."""
        yield from ()


class RelativePositions:
    """Decomposed relative positions of a grid (Li et al., ViTDet, 2022, section 3).

    Args:
        table_h: [2 * rows - 1, head_dim], one row a distance; those of another size are
            interpolated.
        table_w: the same for columns.
        grid: rows and columns of queries and keys.
    """

    def __init__(self, table_h: Tensor, table_w: Tensor, grid: tuple[int, int]) -> None:
        self.tensors, self.grid = (table_h, table_w), grid

    @property
    def columns(self) -> int:
        """Of the grid."""
        return self.grid[1]

    @property
    def key(self) -> Hashable:
        """The grid."""
        return self.grid

    def of_query(self, query: Tensor, heads: slice, first: int, last: int) -> Tensor:
        """See PositionBias."""
        by_row, by_column = position_terms(query, self.tables, first, last)
        return joined_terms(by_row, by_column, query.shape[1])

    def of_steps(
        self, steps: Tensor, step: Tensor, largest: int, heads: slice, first: int, last: int
    ) -> Terms:
        """See PositionBias."""
        steps = operand(steps, float(largest) * LARGEST_DIGIT * steps.shape[-1])
        (row_digits, row_worth), (column_digits, column_worth) = self._digits
        tables = row_digits.to(steps.dtype), column_digits.to(steps.dtype)
        row_sums, column_sums = position_terms(steps, tables, first, last)
        if step.dim():
            # As the sums lie, [batch * heads, rows, columns, 3 * keys].
            step = step.repeat(len(steps), 1, 1)[..., None]
        shape = (*steps.shape[:3], -1)
        by_row = of_terms(row_sums.float().chunk(3, -1), row_worth, step).reshape(shape)
        by_column = of_terms(column_sums.float().chunk(3, -1), column_worth, step).reshape(shape)
        return by_row[..., :, None], by_column[..., None, :]

    def work(self, query: Tensor) -> Iterator[Work]:
        """A product with each row and column of keys."""
        macs = query.numel() * sum(self.grid)
        yield Work("rel_pos", macs, (QUERY, "positions"), ((QUERY, query.numel()),))

    @functools.cached_property
    def tables(self) -> tuple[Tensor, Tensor]:
        """For each axis, rows of its table for each query and key: see `relative_table`."""
        rows, columns = (
            relative_table(table, size) for table, size in zip(self.tensors, self.grid, strict=True)
        )
        return rows, columns

    @functools.cached_property
    def _digits(self) -> tuple[tuple[Tensor, float], ...]:
        """Each table's digits one behind the other, multiplied at once, and the first one's worth.

        [queries, 3 * keys, head_dim].
        """
        found = (table_digits(table) for table in self.tables)
        return tuple((torch.cat(digits, dim=1), worth) for digits, worth in found)


def position_terms(
    query: Tensor, tables: tuple[Tensor, Tensor], first_row: int = 0, last_row: int | None = None
) -> tuple[Tensor, Tensor]:
    """What relative positions of each axis add to logits.

    Args:
        query: [batch, heads, (last_row - first_row) * columns, head_dim], unscaled.
        tables: of the grid of keys, see `relative_table`.
        first_row: first query row.
        last_row: row after the last query row; None for all.

    Returns:
        [batch * heads, query rows, columns, rows] and [batch * heads, query rows, columns,
        columns].
    """
    table_h, table_w = tables
    columns, head_dim = len(table_w), query.shape[-1]
    grid_query = query.reshape(-1, query.shape[2] // columns, columns, head_dim)
    by_row = torch.einsum("brcd,rkd->brck", grid_query, table_h[first_row:last_row])
    by_column = torch.einsum("brcd,ckd->brck", grid_query, table_w)
    return by_row, by_column


def joined_terms(by_row: Tensor, by_column: Tensor, heads: int) -> Tensor:
    """The sum of the terms of both axes: [batch, heads, queries, rows * columns]."""
    rows, columns = by_row.shape[-1], by_column.shape[-1]
    # Contiguous terms make a contiguous sum, which the reshape need not copy.
    bias = by_row.contiguous()[..., :, None] + by_column.contiguous()[..., None, :]
    return bias.reshape(len(by_row) // heads, heads, -1, rows * columns)


def relative_table(table: Tensor, size: int) -> Tensor:
    """Rows of a relative-position table for every query and key position of one axis.

    Args:
        table: [2 * table_size - 1, head_dim].
        size: number of positions; a table made for another size is interpolated linearly.

    Returns:
        [size queries, size keys, head_dim].
    """
    table = table_of_size(table, size)
    return table[relative_rows(size, table.device)]


def table_of_size(table: Tensor, size: int) -> Tensor:
    """A relative-position table for `size` positions, interpolated where it is another's.

    Returns:
        [2 * size - 1, head_dim].
    """
    wanted = 2 * size - 1
    if table.shape[0] == wanted:
        return table
    resized = F.interpolate(table.t()[None], size=wanted, mode="linear")
    return resized[0].t()


def relative_rows(size: int, device: torch.device | str = "cpu") -> Tensor:
    """Which row of the table belongs to each query and key position: [size queries, size keys]."""
    position = torch.arange(size, device=device)
    return position[:, None] - position[None, :] + size - 1


def table_digits(table: Tensor) -> tuple[Digits, float]:
    """Three digits of positions, and what the first one is worth."""
    bound = power_of_two(float(table.detach().abs().max()))
    return digits((table.detach() * (FIXED / bound)).round()), bound * 2.0**14 / FIXED


def of_terms(sums: Sequence[X], worth: float, step: Tensor | float) -> X:
    """Terms from the sums of steps times each of three digits."""
    first, second, third = sums
    return apart(of_digits(first, second, third) * worth * step)
