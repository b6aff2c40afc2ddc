"""Linear layers."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn import functional as F

from ptq4sam.operators.arithmetic import Arithmetic, integer_product, whole_numbers
from ptq4sam.operators.base import (
    INPUT,
    WEIGHT,
    QuantizedLayer,
    Work,
    quantizes,
    step_of_sums,
    work,
)
from ptq4sam.operators.watching import unwatched
from ptq4sam.quantization.memo import Memo
from ptq4sam.quantization.quantizers import Quantizer
from ptq4sam.quantization.whole import WholeLinear, rescaled


@quantizes(nn.Linear)
class QuantizedLinear(QuantizedLayer):
    """A linear layer on quantized input and weight; parameter names stay those of nn.Linear."""

    kind = "linear"

    def __init__(
        self, source: nn.Linear, weight_quantizer: Quantizer, input_quantizer: Quantizer
    ) -> None:
        super().__init__(source, weight_quantizer, input_quantizer)
        self.in_features, self.out_features = source.in_features, source.out_features
        self._whole: Memo[tuple[WholeLinear, Tensor]] = Memo()

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features]."""
        if self._computes_whole():
            return self._forward_whole(x)
        self._whole.clear()
        weight = self.weight_quantizer(self.weight)
        # Observers may weigh errors by what the input is multiplied with.
        return F.linear(self.input_quantizer(x, self.weight.t()), weight, self.bias)

    @whole_numbers
    def _forward_whole(self, x: Tensor) -> Tensor:
        steps = self.input_quantizer(x, steps=True)
        product, step = self._whole.get(self._make_whole, self.sources)
        if self.arithmetic is Arithmetic.INTEGER:
            sums = integer_product(steps, self.weight_quantizer(self.weight, steps=True).t())
        else:
            sums = product(steps)
        with unwatched():
            return rescaled(sums, step, self.bias)

    def _make_whole(self) -> tuple[WholeLinear, Tensor]:
        """Sums of products with the weight from the input's steps, and what one is worth."""
        weight: Tensor = self.weight_quantizer(self.weight, steps=True)
        return WholeLinear(weight, *self.input_quantizer.step_bounds), step_of_sums(self)


@work(nn.Linear, QuantizedLinear)
def _work(
    layer: nn.Linear | QuantizedLinear, inputs: tuple[Tensor, ...], output: Tensor
) -> Iterator[Work]:
    macs = output.numel() * layer.in_features
    yield Work("", macs, (INPUT, WEIGHT), ((INPUT, inputs[0].numel()),))
