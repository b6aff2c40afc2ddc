"""SAM's two attention blocks on integer codes.

Projections give the codes of query, key and value. The product of query and key is a sum of
integers; its logits, the relative positions (float tables applied to the quantized query) and the
softmax are floating point. The softmax becomes codes again; its product with the values is a sum of
integers, which becomes the codes of the output projection's input as in `IntegerLayer`.
"""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn

from ptq4sam.deploy.codes import LogGrid, softmax_grid, uniform_grid
from ptq4sam.deploy.integer.arithmetic import affine_product, require_narrow
from ptq4sam.deploy.integer.layers import IntegerLinear
from ptq4sam.methods.adaptive_granularity import AdaptiveGranularityQuantizer
from ptq4sam.methods.granularity_table import point_table
from ptq4sam.model.attention import (
    QuantizedDecoderAttention,
    QuantizedEncoderAttention,
    logits_worth,
    positions_of,
    softmax_pieces,
    values_worth,
)
from ptq4sam.model.layers import QuantizedLinear
from ptq4sam.model.portable_layers import portable_softmax
from ptq4sam.model.relative_positions import RelativePositions
from ptq4sam.quantization.quantizers import Quantizer
from ptq4sam.sam import image_encoder, transformer


class AttentionProducts(nn.Module):
    """The two products of an attention on codes [batch, heads, tokens, head_dim].

    Args:
        attention: the quantized attention.
        following: the quantizer of what attends, that of the output projection's input.
        name: path of the attention, for messages.

    Raises:
        DeployError: codes are too wide for integer arithmetic.
    """

    points: Tensor | None
    query_step: Tensor
    logits_step: Tensor
    values_step: Tensor

    def __init__(
        self,
        attention: QuantizedEncoderAttention | QuantizedDecoderAttention,
        following: Quantizer,
        name: str,
    ) -> None:
        super().__init__()
        self.name = name
        self.query_grid = uniform_grid(attention.query_quantizer)
        self.key_grid = uniform_grid(attention.key_quantizer)
        self.value_grid = uniform_grid(attention.value_quantizer)
        self.softmax_grid = softmax_grid(attention.softmax_quantizer)
        require_narrow(name, self.query_grid, self.key_grid, self.value_grid, self.softmax_grid)
        self.softmax_quantizer = copy.deepcopy(attention.softmax_quantizer)
        self.following = copy.deepcopy(following)
        worth = logits_worth(
            attention.query_quantizer, attention.key_quantizer, attention.scale, terms=1
        )
        self.register_buffer("query_step", attention.query_quantizer.step.clone())
        self.register_buffer("logits_step", worth.step)
        worth = values_worth(attention.softmax_quantizer, attention.value_quantizer)
        self.register_buffer("values_step", worth.step)
        self.softmax_zero_point, points = 0, None
        if isinstance(self.softmax_grid, LogGrid):
            bits = cast(AdaptiveGranularityQuantizer, attention.softmax_quantizer).fraction_bits()
            grid = self.softmax_grid
            points = point_table(grid.grid.levels, grid.tau, bits).clone()
        else:
            self.softmax_zero_point = self.softmax_grid.zero_point
        self.register_buffer("points", points)

    def accumulate_logits(self, query: Tensor, key: Tensor) -> Tensor:
        """Sums over head_dim of query and key codes less their zero points, int32 [..., n, m]."""
        return affine_product(
            query,
            key.transpose(-1, -2),
            self.query_grid.zero_point,
            self.key_grid.zero_point,
            torch.int32,
        )

    def logits(self, accumulator: Tensor) -> Tensor:
        """Logits in float32, without relative positions."""
        return accumulator.float() * self.logits_step

    def softmax_codes(self, logits: Tensor) -> Tensor:
        """Codes of the softmax of logits."""
        return self.softmax_quantizer.codes(portable_softmax(logits))

    def accumulate_values(self, attention: Tensor, value: Tensor) -> Tensor:
        """Sums over keys of attention times value code less its zero point.

        Args:
            attention: softmax codes [..., n, m].
            value: codes [..., m, head_dim].

        Returns:
            int32 for evenly spaced codes; int64 in units of the last fraction bit else.
        """
        require_narrow(self.name, self.value_grid, terms=value.shape[-2])
        numbers, dtype = attention, torch.int32
        if self.points is not None:
            # As the product takes them: int64 between would be as large again.
            points, dtype = self.points.to(torch.float64), torch.int64
            numbers = points.index_select(0, attention.flatten()).reshape(attention.shape)
        return affine_product(
            numbers, value, self.softmax_zero_point, self.value_grid.zero_point, dtype
        )

    def requantize(self, accumulator: Tensor) -> Tensor:
        """Codes of the output projection's input, int32: see `IntegerLayer` for the order."""
        return self.following.codes(accumulator.float() * self.values_step)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: RelativePositions | None = None,
        columns: int = 1,
    ) -> Tensor:
        """Attend with codes; arguments as for the simulation, the result as codes."""
        result = torch.empty(
            *query.shape[:3], value.shape[-1], dtype=torch.int32, device=query.device
        )
        for head, first, last in softmax_pieces(query, key, columns):
            tokens = slice(first * columns, last * columns)
            part = query[:, head, tokens]
            logits = self.logits(self.accumulate_logits(part, key[:, head]))
            if positions is not None:
                steps = (part - self.query_grid.zero_point).float()
                largest = self.query_grid.grid.largest_step
                logits += positions.of_steps(steps, self.query_step, largest, first, last)
            attention = self.softmax_codes(logits)
            sums = self.accumulate_values(attention, value[:, head])
            result[:, head, tokens] = self.requantize(sums)
        return result


class IntegerEncoderAttention(image_encoder.Attention):
    """The image encoder's attention on integer codes."""

    def __init__(self, source: QuantizedEncoderAttention, name: str) -> None:
        nn.Module.__init__(self)
        self.num_heads, self.scale = source.num_heads, source.scale
        self.use_rel_pos = source.use_rel_pos
        if source.use_rel_pos:
            self.rel_pos_h = copy.deepcopy(source.rel_pos_h)
            self.rel_pos_w = copy.deepcopy(source.rel_pos_w)
        qkv, proj = (_integer_linear(source, part, name) for part in ("qkv", "proj"))
        self.products = AttentionProducts(source, proj.input_quantizer, name)
        qkv.set_output_quantizers(_operand_quantizers(source))
        self.add_module("qkv", qkv)
        self.add_module("proj", proj)

    def forward(self, x: Tensor) -> Tensor:
        """As the float block: [batch, rows, columns, dim] to the same shape."""
        grid = (x.shape[1], x.shape[2])
        attended = self.products(
            *self.split_heads(_codes(self.qkv, x)), positions_of(self, grid), columns=grid[1]
        )
        return _output(self.proj, self.merge_heads(attended, grid))


class IntegerDecoderAttention(transformer.Attention):
    """The mask decoder's attention on integer codes."""

    def __init__(self, source: QuantizedDecoderAttention, name: str) -> None:
        nn.Module.__init__(self)
        self.num_heads, self.scale = source.num_heads, source.scale
        output = _integer_linear(source, "out_proj", name)
        self.products = AttentionProducts(source, output.input_quantizer, name)
        parts = zip(("q_proj", "k_proj", "v_proj"), _operand_quantizers(source), strict=True)
        for part, quantizer in parts:
            projection = _integer_linear(source, part, name)
            projection.set_output_quantizers([quantizer])
            self.add_module(part, projection)
        self.add_module("out_proj", output)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As the float block: q [batch, n, dim], k and v [batch, m, dim] to [batch, n, dim]."""
        attended = self.products(
            self.split_heads(_codes(self.q_proj, q)),
            self.split_heads(_codes(self.k_proj, k)),
            self.split_heads(_codes(self.v_proj, v)),
        )
        return _output(self.out_proj, self.merge_heads(attended))


def _operand_quantizers(
    source: QuantizedEncoderAttention | QuantizedDecoderAttention,
) -> tuple[Quantizer, Quantizer, Quantizer]:
    return source.query_quantizer, source.key_quantizer, source.value_quantizer


def _integer_linear(attention: nn.Module, part: str, name: str) -> IntegerLinear:
    layer = cast(QuantizedLinear, attention.get_submodule(part))
    return IntegerLinear(layer, f"{name}.{part}")


# The float classes call their projections nn.Linear: of these here, they are integer ones.
def _codes(projection: nn.Module, x: Tensor) -> Tensor:
    """Codes of a projection of a float input."""
    layer = cast(IntegerLinear, projection)
    return layer.requantize(layer.accumulate(layer.quantize(x)))


def _output(projection: nn.Module, codes: Tensor) -> Tensor:
    """Float output of the projection of codes."""
    layer = cast(IntegerLinear, projection)
    return layer.dequantize(layer.accumulate(codes))
