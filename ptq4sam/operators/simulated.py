"""`compat: study`: operators as a published study simulates them.

Bengs and Ryhede Bengtsson, "Simulated Quantization of EfficientViT-SAM" (Lund, 2024) quantize what
a convolution takes, its weight, and once more what it gives, what the normalisation behind it gives
and what the activation gives; of a linear attention each intermediate tensor. Batch normalisations
are not folded. No device computes so: results are rounded, and then in float again.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq4sam.operators.activation import ChannelGELU
from ptq4sam.operators.base import (
    KEY,
    QUERY,
    STATE,
    VALUE,
    WORK,
    Product,
    QuantizedOperator,
)
from ptq4sam.operators.convolution import QuantizedConv2d
from ptq4sam.operators.linear_attention import (
    EPS,
    KeyValueProduct,
    QueryStateProduct,
    ReluLinearAttention,
)
from ptq4sam.quantization.quantizers import Quantizer

OUTPUT = "output"
"""Slot of a result."""
POSITIVE_QUERY, POSITIVE_KEY = "positive_query", "positive_key"
"""Slots behind a ReLU."""
SUMS = "sums"
"""Slot of queries times the state of a linear attention."""


class SimulatedConv2d(QuantizedConv2d):
    """A convolution on quantized input and weight, whose result is quantized too."""

    slot_names = (*QuantizedConv2d.slot_names, OUTPUT)
    output_quantizer: Quantizer

    def __init__(
        self,
        source: nn.Conv2d,
        weight_quantizer: Quantizer,
        input_quantizer: Quantizer,
        output_quantizer: Quantizer,
    ) -> None:
        super().__init__(source, weight_quantizer, input_quantizer)
        self.output_quantizer = output_quantizer

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, in_channels, height, width] to [batch, out_channels, height', width']."""
        weight = self.weight_quantizer(self.weight)
        given = F.conv2d(self.input_quantizer(x), weight, self.bias, *self.windows.of_torch)
        quantized: Tensor = self.output_quantizer(given)
        return quantized


class SimulatedBatchNorm2d(QuantizedOperator):
    """A batch normalisation with fixed statistics, whose result is quantized; names stay."""

    slot_names = (OUTPUT,)
    output_quantizer: Quantizer
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, source: nn.BatchNorm2d, output_quantizer: Quantizer) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = source.weight, source.bias, source.eps
        self.register_buffer("running_mean", source.running_mean)
        self.register_buffer("running_var", source.running_var)
        self.output_quantizer = output_quantizer

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [batch, channels, height, width]."""
        statistics = (self.running_mean, self.running_var)
        given = F.batch_norm(x, *statistics, self.weight, self.bias, eps=self.eps)
        quantized: Tensor = self.output_quantizer(given)
        return quantized

    def products(self) -> tuple[Product, ...]:
        """None."""
        return ()


class SimulatedGELU(QuantizedOperator):
    """A GELU whose result is quantized."""

    slot_names = (OUTPUT,)
    output_quantizer: Quantizer

    def __init__(self, source: nn.GELU, output_quantizer: Quantizer) -> None:
        super().__init__()
        self.approximate = source.approximate
        self.output_quantizer = output_quantizer

    def forward(self, x: Tensor) -> Tensor:
        """Activate each element; the shape stays."""
        quantized: Tensor = self.output_quantizer(F.gelu(x, approximate=self.approximate))
        return quantized

    def products(self) -> tuple[Product, ...]:
        """None."""
        return ()


class SimulatedLinearAttention(QuantizedOperator):
    """Linear attention, of which every intermediate tensor is quantized.

    Queries, keys and values are quantized before the ReLU, the first two also behind it. The sums
    of shares are one more column of values, and share the scales of both products.
    """

    slot_names = (QUERY, KEY, VALUE, POSITIVE_QUERY, POSITIVE_KEY, STATE, SUMS, OUTPUT)

    def __init__(self, _source: ReluLinearAttention, *quantizers: Quantizer) -> None:
        super().__init__()
        for slot, quantizer in zip(self.slot_names, quantizers, strict=True):
            setattr(self, f"{slot}_quantizer", quantizer)
        self.key_value = KeyValueProduct()
        self.query_state = QueryStateProduct()

    def products(self) -> tuple[Product, ...]:
        """Key times value, query times state."""
        return (
            Product("key_value", self.key_value, POSITIVE_KEY, VALUE),
            Product("query_state", self.query_state, POSITIVE_QUERY, STATE),
        )

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As the float operator."""
        query = self._at(POSITIVE_QUERY, self._at(QUERY, query).relu())
        key = self._at(POSITIVE_KEY, self._at(KEY, key).relu())
        value = self._at(VALUE, value)
        total = key.sum(-2, keepdim=True).transpose(-1, -2)
        state = self._at(STATE, torch.cat([self.key_value(key, value), total], dim=-1))
        sums = self._at(SUMS, self.query_state(query, state))
        return self._at(OUTPUT, sums[..., :-1] / (sums[..., -1:] + EPS))

    def _at(self, slot: str, x: Tensor) -> Tensor:
        quantized: Tensor = self.quantizer(slot)(x)
        return quantized


SIMULATED: dict[type[nn.Module], type[QuantizedOperator]] = {
    nn.Conv2d: SimulatedConv2d,
    nn.BatchNorm2d: SimulatedBatchNorm2d,
    nn.GELU: SimulatedGELU,
    ChannelGELU: SimulatedGELU,
    ReluLinearAttention: SimulatedLinearAttention,
}
"""What of a network is simulated, and how; anything else has no simulated form."""

WORK.update({form: WORK[kind] for kind, form in SIMULATED.items() if kind in WORK})
