"""Linear attention with ReLU, the leaf: query, key and value in, what attends out.

Katharopoulos et al., "Transformers are RNNs" (2020), equation 5, with the feature map of Cai et
al., "EfficientViT" (2023): keys times values are summed once for all queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from ptq4sam.operators.arithmetic import Arithmetic, whole_numbers
from ptq4sam.operators.attention_products import Whole, by_head
from ptq4sam.operators.base import (
    KEY,
    QUERY,
    STATE,
    VALUE,
    Product,
    QuantizedOperator,
    Work,
    quantizes,
    work,
)
from ptq4sam.quantization import portable
from ptq4sam.quantization.base import Mode, Quantizer

EPS = 1e-15
"""Added to the sum of a query's shares."""

X = TypeVar("X", bound=portable.Arithmetic)


class ReluLinearAttention(nn.Module):
    """relu(query) (relu(key)^T value) / (relu(query) sum of relu(key))."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend.

        Args:
            query: [batch, heads, n, head_dim].
            key: [batch, heads, m, head_dim].
            value: [batch, heads, m, value_dim].

        Returns:
            [batch, heads, n, value_dim].
        """
        query, key = query.relu(), key.relu()
        state = key.transpose(-1, -2) @ value
        shares = query @ key.sum(-2, keepdim=True).transpose(-1, -2)
        return (query @ state) / (shares + EPS)


class KeyValueProduct(nn.Module):
    """Keys [..., m, head_dim] times values [..., m, value_dim]: [..., head_dim, value_dim]."""

    def forward(self, key: Tensor, value: Tensor, whole: Whole | None = None) -> Tensor:
        """Multiply, and sum over places."""
        key = key.transpose(-1, -2)
        return key @ value if whole is None else whole.product(key, value)


class QueryStateProduct(nn.Module):
    """Queries [..., n, head_dim] times a state [..., head_dim, w]: [..., n, w]."""

    def forward(self, query: Tensor, state: Tensor, whole: Whole | None = None) -> Tensor:
        """Multiply; of steps, sums of steps."""
        return query @ state if whole is None else whole.product(query, state)


@quantizes(ReluLinearAttention)
class QuantizedReluLinearAttention(QuantizedOperator):
    """Linear attention in the open, so that its parts can be quantized.

    Query and key are quantized behind their ReLUs. The state is what queries are multiplied with:
    the products of keys and values, and one more column, the sum of keys times the largest number
    that the value's grid has. As no product of keys and values exceeds that column, no code of them
    does either, and what attends stays within the range of values whatever the bits. Products are
    of whole numbers; the quotient of two of their sums is float.
    """

    slot_names = (QUERY, KEY, VALUE, STATE)
    wide_slots = frozenset({STATE})
    query_quantizer: Quantizer
    key_quantizer: Quantizer
    value_quantizer: Quantizer
    state_quantizer: Quantizer

    def __init__(
        self,
        _source: ReluLinearAttention,
        query: Quantizer,
        key: Quantizer,
        value: Quantizer,
        state: Quantizer,
    ) -> None:
        super().__init__()
        self.query_quantizer = query
        self.key_quantizer = key
        self.value_quantizer = value
        self.state_quantizer = state
        self.key_value = KeyValueProduct()
        self.query_state = QueryStateProduct()

    def products(self) -> tuple[Product, ...]:
        """Key times value, query times state."""
        return (
            Product("key_value", self.key_value, KEY, VALUE),
            Product("query_state", self.query_state, QUERY, STATE),
        )

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As the float operator."""
        if self._computes_whole():
            return self._forward_whole(query, key, value)
        query = self.query_quantizer(query.relu())
        key = self.key_quantizer(key.relu())
        value = self.value_quantizer(value)
        unit = self._unit(value)
        total = key.sum(-2, keepdim=True).transpose(-1, -2) * unit
        state = self.state_quantizer(torch.cat([self.key_value(key, value), total], dim=-1))
        sums = self.query_state(query, state)
        shares = sums[..., -1:].clamp(min=self._smallest_share())
        attended: Tensor = sums[..., :-1] / shares * unit
        return attended

    @whole_numbers
    def _forward_whole(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """With products of whole numbers, and a portable quotient."""
        query = self.query_quantizer(query.relu(), steps=True)
        key = self.key_quantizer(key.relu(), steps=True)
        value = self.value_quantizer(value, steps=True)
        exact = self.arithmetic is Arithmetic.INTEGER
        first, second, worth, unit = self.worths(key.shape[-2], key.shape[-1], exact)
        # Whole numbers, whose sum float64 holds.
        total = key.sum(-2, keepdim=True, dtype=torch.float64).float().transpose(-1, -2) * worth
        state = torch.cat([self.key_value(key, value, first), total], dim=-1)
        sums = self.query_state(query, self.state_quantizer(state, steps=True), second)
        attended: Tensor = quotients(sums[..., :-1], sums[..., -1:], unit)
        return attended

    def worths(
        self, places: int, head_dim: int, exact: bool = False
    ) -> tuple[Whole, Whole, Tensor, Tensor]:
        """What the sums of steps are worth.

        Args:
            places: keys that are summed.
            head_dim: of a query.
            exact: products are summed in int64.

        Returns:
            Worths of both products (of the second one steps, whose quotients count), what a step of
            the sum of keys is worth in the state, and the largest value: each [] or, where heads
            have scales, [heads, 1, 1].
        """
        query, key, value, state = (self.quantizer(slot).grid for slot in self.slot_names)
        unit = largest_value(self.value_quantizer)
        largest = float(places) * key.largest_step * value.largest_step
        step = by_head(self.key_quantizer.step)
        first = Whole(step * by_head(self.value_quantizer.step), largest, exact)
        largest = float(head_dim) * query.largest_step * state.largest_step
        second = Whole(unit.new_ones(()), largest, exact)
        return first, second, step * unit, unit

    def _unit(self, value: Tensor) -> Tensor:
        """The largest value: of the grid, or of what came where that is not in use."""
        if self.value_quantizer.mode is Mode.QUANTIZE:
            return largest_value(self.value_quantizer)
        return value.detach().abs().amax().clamp(min=torch.finfo(value.dtype).tiny)

    def _smallest_share(self) -> float | Tensor:
        """The smallest sum of shares that is not 0; of 0 the numerator is 0 too."""
        slots = (self.query_quantizer, self.state_quantizer)
        if any(quantizer.mode is not Mode.QUANTIZE for quantizer in slots):
            return EPS
        return by_head(slots[0].step * slots[1].step).detach()


def largest_value(quantizer: Quantizer) -> Tensor:
    """The point of a grid that is farthest from 0: [], or [heads, 1, 1], positive."""
    affine = quantizer.as_affine()
    if affine is not None:
        scale, zero_point = affine.parameters_in_use()
        grid = affine.grid
        return by_head(scale * torch.maximum(zero_point - grid.qmin, grid.qmax - zero_point))
    return quantizer.step * quantizer.grid.largest_step


def quotients(values: X, shares: X, unit: Tensor | float) -> X:
    """Values / shares * unit, of sums of steps; 0 where there is no share."""
    return portable.apart(portable.over(values, shares.clamp(min=1.0))) * unit


@work(ReluLinearAttention, QuantizedReluLinearAttention)
def _work(
    _attention: ReluLinearAttention | QuantizedReluLinearAttention,
    inputs: tuple[Tensor, ...],
    output: Tensor,
) -> Iterator[Work]:
    query, key, value = inputs
    state = key[..., 0, :].numel() * (value.shape[-1] + 1)
    read = ((KEY, key.numel()), (VALUE, value.numel()))
    yield Work("key_value", key.numel() * value.shape[-1], (KEY, VALUE), read)
    read = ((QUERY, query.numel()), (STATE, state))
    yield Work("query_state", query.numel() * (output.shape[-1] + 1), (QUERY, STATE), read)
