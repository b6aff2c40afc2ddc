"""Relative positions of a quantized attention: of its float query, or of whole steps of it."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor

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
from ptq4sam.sam.image_encoder import Attention, joined_terms, position_terms

Digits = tuple[Tensor, Tensor, Tensor]


class RelativePositions:
    """Adds them to logits of some rows of a grid.

    Args:
        attention: owner of the tables.
        grid: rows and columns of the keys.
    """

    def __init__(self, attention: Attention, grid: tuple[int, int]) -> None:
        self._attention = attention
        self._grid = grid

    def of_query(self, query: Tensor, first: int, last: int) -> Tensor:
        """Logits to add for the grid rows first to last of a query [batch, heads, n, head_dim]."""
        return self._attention.position_bias(query, self._tables, first, last)

    def of_steps(self, steps: Tensor, step: Tensor, largest: int, first: int, last: int) -> Tensor:
        """The same for a query of whole steps, the same bits everywhere.

        Args:
            steps: the query.
            step: what one is worth.
            largest: of them, absolute.
            first: grid row.
            last: grid row behind.
        """
        steps = operand(steps, float(largest) * LARGEST_DIGIT * steps.shape[-1])
        found = [
            [
                terms.float()
                for terms in position_terms(
                    steps, (by_row.to(steps.dtype), by_column.to(steps.dtype)), first, last
                )
            ]
            for by_row, by_column in zip(*(table for table, _ in self._digits), strict=True)
        ]
        by_row, by_column = (
            of_terms(sums, worth, step)
            for sums, (_, worth) in zip(zip(*found, strict=True), self._digits, strict=True)
        )
        return joined_terms(by_row, by_column, steps.shape[1])

    @functools.cached_property
    def _tables(self) -> tuple[Tensor, Tensor]:
        return self._attention.position_tables(self._grid)

    @functools.cached_property
    def _digits(self) -> tuple[tuple[Digits, float], ...]:
        return tuple(table_digits(table) for table in self._tables)


def table_digits(table: Tensor) -> tuple[Digits, float]:
    """Three digits of positions, and what the first one is worth."""
    bound = power_of_two(float(table.detach().abs().max()))
    return digits((table.detach() * (FIXED / bound)).round()), bound * 2.0**14 / FIXED


def of_terms(sums: Sequence[X], worth: float, step: X | float) -> X:
    """Terms from the sums of steps times each of three digits."""
    first, second, third = sums
    return apart(of_digits(first, second, third) * worth * step)
