"""The two products of a softmax attention, on values or on whole numbers of steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ptq4sam.operators.arithmetic import integer_product
from ptq4sam.operators.bias import Terms
from ptq4sam.operators.watching import unwatched
from ptq4sam.quantization import hard_numbers, portable
from ptq4sam.quantization.fused import fused_exactly
from ptq4sam.quantization.quantizers import Quantizer
from ptq4sam.quantization.whole import operand, whole_product


def by_head(parameter: Tensor, heads: slice = slice(None)) -> Tensor:
    """Numbers [heads] as some heads of [batch, heads, n, m] take them, [heads, 1, 1]; [] stays."""
    return parameter[heads, None, None] if parameter.dim() else parameter


@dataclass(frozen=True)
class Whole:
    """What a product of steps is worth.

    Attributes:
        step: float32, worth of a product of 1: [], or [heads, 1, 1] where heads have scales.
        largest: what no partial sum exceeds.
        integer: sum in int64.
    """

    step: Tensor
    largest: float
    integer: bool = False

    def of_heads(self, heads: slice) -> Whole:
        """The same of some heads."""
        return replace(self, step=self.step[heads]) if self.step.dim() else self

    def operand(self, x: Tensor) -> Tensor:
        """`x` as the product takes it, to be made once where it is multiplied in pieces."""
        return x if self.integer else operand(x, self.largest)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """The product of a [..., n, K] and b [..., K, m], both in steps, in float32."""
        return self.sums(a, b).mul_(self.step)

    def sums(self, a: Tensor, b: Tensor) -> Tensor:
        """The same in steps."""
        return integer_product(a, b) if self.integer else whole_product(a, b, self.largest)


def logits_worth(query: Quantizer, key: Quantizer, scale: float, terms: int) -> Whole:
    """Worth of the product of query and key steps, with the attention's scale.

    Args:
        query: the quantizer of the query.
        key: the quantizer of the key.
        scale: of the attention.
        terms: head_dim.
    """
    largest = float(terms) * query.grid.largest_step * key.grid.largest_step
    return Whole(by_head(query.step * (key.step * scale)), largest)


def values_worth(softmax: Quantizer, value: Quantizer) -> Whole:
    """Worth of the product of softmax and value steps, for any number of keys."""
    row = softmax.largest_row / float(softmax.step)
    return Whole(by_head(softmax.step * value.step), row * value.grid.largest_step)


class QueryKeyProduct(nn.Module):
    """Logits of queries [..., n, head_dim] and keys [..., m, head_dim]: [..., n, m].

    A module, as the other product, so that hooks see the operands of both.
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(
        self, query: Tensor, key: Tensor, whole: Whole | None = None, bias: Terms | None = None
    ) -> Tensor:
        """Scale the query, then multiply; of steps, multiply, then scale and add a bias."""
        if whole is None:
            return (query * self.scale) @ key.transpose(-1, -2)
        sums = whole.sums(query, key.transpose(-1, -2))
        return sums.mul_(whole.step) if bias is None else biased(sums, whole.step, bias)


class AttentionValueProduct(nn.Module):
    """Attention [..., n, m] times values [..., m, head_dim]: [..., n, head_dim]."""

    def forward(self, attention: Tensor, value: Tensor, whole: Whole | None = None) -> Tensor:
        """Multiply."""
        return attention @ value if whole is None else whole.product(attention, value)


def biased(sums: Tensor, step: Tensor, bias: Terms) -> Tensor:
    """Logits sums * step + bias, each product and sum rounded; terms of a bias are added first.

    Args:
        sums: [batch, heads, n, keys] float32, whole numbers; is written over.
        step: [] or [heads, 1, 1], what 1 of them is worth.
        bias: see `PositionBias.of_steps`.
    """
    if len(bias) == 1:
        return sums.mul_(step).add_(bias[0])
    by_row, by_column = (terms.reshape(-1, *terms.shape[-2:]) for terms in bias)
    grid = sums.reshape(-1, by_row.shape[-2], by_column.shape[-1])
    if step.dim():
        step = step.expand(*sums.shape[:3], 1).reshape(-1, 1, 1)
    return _biased(grid, step, by_row, by_column).reshape(sums.shape)


def _hard_sums(sums: Tensor, step: Tensor, *bias: Tensor) -> Iterator[tuple[Tensor, ...]]:
    rows = len(hard_numbers.some_rows(sums.flatten(1)))
    whole = hard_numbers.whole_numbers(sums[:rows])
    others = (x[:rows] if x.dim() else x for x in (step, *bias))
    yield whole, *(hard_numbers.numbers(x) for x in others)


@unwatched()
@fused_exactly(_hard_sums)
def _biased(sums: Tensor, step: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    return portable.apart(sums * step) + (by_row + by_column)
