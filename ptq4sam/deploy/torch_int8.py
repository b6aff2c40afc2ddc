"""A quantized SAM whose linear layers multiply integers in torch (torch._int_mm)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ptq4sam.deploy.codes import layer_codes, uniform_grid
from ptq4sam.errors import DeployError
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.model.layers import QuantizedLinear
from ptq4sam.quantization.division import divided
from ptq4sam.quantization.fused import fused_exactly
from ptq4sam.quantization.hard_numbers import near_steps
from ptq4sam.quantization.int8_products import gives_exact_int8_products
from ptq4sam.quantization.whole import WholeLinear, rescaled

_BITS = 8
_SIGN = 128
"""What is subtracted of a code of 0 to 255 to fit int8."""


class Int8Linear(nn.Module):
    """A quantized linear layer on integers.

    With codes a of the input, codes w of the weight, their zero points z and y, and the scales s
    and t, each output is

        (sum a w - z sum w - y sum a + z y in_features) s t + bias,

    in which the parenthesis is exact, in int32. Up to 7 bits and for symmetric weights w are the
    distances from the zero point, so that y is 0. Outputs are those of the simulation, to the bit.
    Where int8 products saturate, the whole numbers (a - z) and (w - y) are multiplied in float32.

    Args:
        layer: a frozen layer.
        path: its name, for messages.

    Raises:
        DeployError: it has more than 8 bits, or its weight is not on its grid.
    """

    weight: Tensor
    weight_zero_point: Tensor
    weight_sums: Tensor
    scale: Tensor
    input_scale: Tensor
    input_zero_point: Tensor

    def __init__(self, layer: QuantizedLinear, path: str) -> None:
        super().__init__()
        weight, given = layer_codes(layer), uniform_grid(layer.input_quantizer)
        bits = max(weight.grid.bits, given.grid.bits)
        if bits > _BITS:
            raise DeployError(
                f"{path} has {bits} bits, integer products take up to {_BITS}: quantize to fewer"
            )
        scale, zero_point = weight.by_channel()
        codes = weight.codes - zero_point[:, None]
        zero_point = torch.zeros_like(zero_point)
        if int(codes.abs().max()) > _SIGN - 1 and not weight.grid.symmetric:
            codes = weight.codes - _SIGN
            zero_point = weight.by_channel()[1] - _SIGN
        self._shift = _SIGN if given.grid.qmax >= _SIGN else 0
        self._codes = (given.grid.qmin, given.grid.qmax)
        self._has_weight_zero_point = bool(zero_point.any())
        shifted = given.zero_point - self._shift
        constant = shifted * zero_point * layer.in_features
        self._shifted_zero_point = shifted
        self._largest_step = given.grid.largest_step
        self.register_buffer("weight", codes.to(torch.int8).t())
        self.register_buffer("weight_zero_point", zero_point)
        # All of the parenthesis that does not depend on the input.
        self.register_buffer("weight_sums", constant - shifted * codes.sum(1, dtype=torch.int32))
        self.register_buffer("scale", scale * given.scale)
        self.register_buffer("input_scale", scale.new_tensor(given.scale))
        self.register_buffer("input_zero_point", scale.new_tensor(given.zero_point))
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features]."""
        flat = x.reshape(-1, x.shape[-1])
        codes = _codes(flat, self.input_scale, self.input_zero_point, *self._codes, self._shift)
        sums = self._sums(codes) if gives_exact_int8_products(x.device) else self._float_sums(codes)
        return rescaled(sums, self.scale, self.bias).reshape(*x.shape[:-1], -1)

    def _sums(self, codes: Tensor) -> Tensor:
        sums = torch._int_mm(codes, self.weight)
        if self._has_weight_zero_point:
            sums -= codes.sum(1, dtype=torch.int32)[:, None] * self.weight_zero_point
        sums += self.weight_sums
        return sums.float()

    def _float_sums(self, codes: Tensor) -> Tensor:
        steps = codes.float() - self._shifted_zero_point
        weight = (self.weight.float() - self.weight_zero_point).t()
        return WholeLinear(weight, -self._largest_step, self._largest_step)(steps)


def with_integer_products(sam: QuantizedSam) -> QuantizedSam:
    """A copy of a frozen model whose linear layers compute on integers.

    Everything else (convolutions, products of an attention) stays as in the simulation.

    Raises:
        DeployError: a layer has no integer form; the message names it.
    """
    # The copy need not hold float weights that it does not use.
    layers = {
        name: module for name, module in sam.named_modules() if isinstance(module, QuantizedLinear)
    }
    kept = {id(parameter): parameter for layer in layers.values() for parameter in [layer.weight]}
    integer: QuantizedSam = copy.deepcopy(sam, kept)
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(integer.get_submodule(parent), child, Int8Linear(layer, name))
    return integer.eval().requires_grad_(False)


@fused_exactly(near_steps(scale_at=1))
def _codes(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, shift: int
) -> Tensor:
    codes = divided(x, scale).round_().add_(zero_point).clamp_(qmin, qmax).sub_(shift)
    return codes.to(torch.int8)
