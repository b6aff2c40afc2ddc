"""Simulation against integer reference, one operator at a time on the simulation's inputs.

A whole network amplifies a code that was rounded the other way until two correct computations
differ as much as quantization itself makes them, so that tensors at its end prove nothing. Here
every linear layer, convolution and attention product of the simulation is computed again in
integers, from what the simulation gave it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq4sam.deploy.codes import UniformGrid, layer_codes
from ptq4sam.deploy.integer.attention import AttentionProducts
from ptq4sam.deploy.integer.layers import IntegerLayer
from ptq4sam.model.attention import QuantizedDecoderAttention, QuantizedEncoderAttention
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.model.layers import QuantizedLayer, QuantizedLinear, quantized_layers
from ptq4sam.quantization.grid import along_channels
from ptq4sam.quantization.quantizers import Quantizer
from ptq4sam.sam.model import Sam

EQUAL_SHARE = 0.999
"""Of an operator's output codes, at least so many equal those of the simulation."""
LARGEST_DIFFERENCE = 1.0
"""Most that an output differs, in steps of its grid."""

# Logits of few bits are multiples of one number: on a grid that fits them many would lie exactly
# between two codes.
_UNEVEN = 0.618

_Attention = QuantizedEncoderAttention | QuantizedDecoderAttention


@dataclass
class OperatorCheck:
    """What one operator gave over all calls.

    Attributes:
        name: path in the model.
        outputs: output values compared.
        equal: those whose code is the simulation's.
        largest: largest difference in steps of the output grid. An output that goes to a quantizer
            has that one's grid; any other has one of as many codes over its range in the call.
        exact: whether all sums equal those of the simulation's operands in float64.
    """

    name: str
    outputs: int = 0
    equal: int = 0
    largest: float = 0.0
    exact: bool = True

    @property
    def share(self) -> float:
        """Share of equal codes."""
        return self.equal / max(1, self.outputs)

    @property
    def kept(self) -> bool:
        """Whether the promises are kept.

        Of few outputs a single one may differ, which is more than one in a thousand.
        """
        few = self.outputs - self.equal <= 1
        near = self.largest <= LARGEST_DIFFERENCE
        return self.outputs > 0 and self.exact and near and (few or self.share >= EQUAL_SHARE)

    def add_codes(self, ours: Tensor, simulated: Tensor) -> None:
        """Compare codes of a quantized output."""
        difference = (ours - simulated).abs()
        self._add(int((difference == 0).sum()), difference.numel(), float(difference.max()))

    def add_floats(self, ours: Tensor, simulated: Tensor, levels: int) -> None:
        """Compare an output that stays float, on a grid of `levels` codes over its range."""
        low, high = torch.aminmax(simulated)
        step = ((high - low) / (levels - _UNEVEN)).clamp(min=torch.finfo(torch.float32).tiny)
        equal = torch.round((ours - low) / step) == torch.round((simulated - low) / step)
        largest = float(((ours - simulated).abs() / step).max())
        self._add(int(equal.sum()), equal.numel(), largest)

    def add_sums(self, ours: Tensor, simulated: Tensor) -> None:
        """Compare accumulators with exact ones."""
        self.exact &= torch.equal(ours.to(torch.float64), simulated)

    def _add(self, equal: int, outputs: int, largest: float) -> None:
        self.equal += equal
        self.outputs += outputs
        self.largest = max(self.largest, largest)


@torch.no_grad()
def verify_operators(
    sam: QuantizedSam, integer: Sam, run: Callable[[], object]
) -> list[OperatorCheck]:
    """Compare every quantized operator on what it sees in a forward pass of the simulation.

    Args:
        sam: the frozen model.
        integer: its integer form (see `integer_model`).
        run: passes pictures and prompts through `sam`.

    Returns:
        A check for each linear layer, convolution and attention product, in order of the modules.
        One without outputs was not reached.
    """
    checks: list[OperatorCheck] = []
    with _watching(sam, integer, checks):
        run()
    return checks


def worst_first(checks: Sequence[OperatorCheck]) -> list[OperatorCheck]:
    """Broken promises first, then by share of equal codes."""
    return sorted(checks, key=lambda check: (check.kept, check.exact, check.share))


@contextlib.contextmanager
def _watching(sam: QuantizedSam, integer: Sam, checks: list[OperatorCheck]) -> Iterator[None]:
    outputs = _output_quantizers(sam)
    hooks: list[tuple[nn.Module, Callable[..., None]]] = []
    for name, layer in quantized_layers(sam):
        checks.append(OperatorCheck(name))
        counterpart = cast(IntegerLayer, integer.get_submodule(name))
        hooks.append((layer, _layer_hook(checks[-1], counterpart, outputs.get(name, []))))
    for name, attention in _attentions(sam):
        products = cast(AttentionProducts, integer.get_submodule(f"{name}.products"))
        for product, make in (
            (attention.query_key, _logits_hook),
            (attention.attention_value, _values_hook),
        ):
            path = "query_key" if make is _logits_hook else "attention_value"
            checks.append(OperatorCheck(f"{name}.{path}"))
            hooks.append((product, make(checks[-1], products, attention)))
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attentions(sam: QuantizedSam) -> list[tuple[str, _Attention]]:
    return [
        (name, module) for name, module in sam.named_modules() if isinstance(module, _Attention)
    ]


def _output_quantizers(sam: QuantizedSam) -> dict[str, list[Quantizer]]:
    """Quantizers that share the output of a layer, by its path; layers with float outputs lack."""
    found: dict[str, list[Quantizer]] = {}
    for name, attention in _attentions(sam):
        three = [attention.query_quantizer, attention.key_quantizer, attention.value_quantizer]
        if isinstance(attention, QuantizedEncoderAttention):
            found[f"{name}.qkv"] = three
        else:
            for projection, quantizer in zip(("q_proj", "k_proj", "v_proj"), three, strict=True):
                found[f"{name}.{projection}"] = [quantizer]
    return found


def _layer_hook(
    check: OperatorCheck, layer: IntegerLayer, outputs: Sequence[Quantizer]
) -> Callable[..., None]:
    def hook(simulated: QuantizedLayer, inputs: tuple[Tensor], output: Tensor) -> None:
        accumulator = layer.accumulate(layer.quantize(inputs[0]))
        check.add_sums(accumulator, _layer_sums(simulated, inputs[0], layer.input_grid))
        if not outputs:
            levels = layer.input_grid.grid.levels
            check.add_floats(layer.dequantize(accumulator), output, levels)
            return
        parts = output.chunk(len(outputs), dim=-1)
        codes = [quantizer.codes(part) for quantizer, part in zip(outputs, parts, strict=True)]
        check.add_codes(layer.requantize(accumulator), torch.cat(codes, dim=-1))

    return hook


def _layer_sums(layer: QuantizedLayer, x: Tensor, grid: UniformGrid) -> Tensor:
    """Exact sums of the simulation's quantized operands, in units of both scales."""
    scale = along_channels(layer_codes(layer).scale, layer.weight.dim(), 0)
    weight = _steps(layer.weight, scale)
    steps = _steps(layer.input_quantizer(x), grid.scale)
    if isinstance(layer, QuantizedLinear):
        return F.linear(steps, weight)
    return F.conv2d(steps, weight, None, layer.stride, layer.padding, layer.dilation)


def _steps(quantized: Tensor, scale: Tensor | float) -> Tensor:
    """How many steps of its grid a quantized tensor is away from zero, float64."""
    return torch.round(quantized / scale).double()


def _codes(steps: Tensor, grid: UniformGrid) -> Tensor:
    """Codes of what a product of the simulation was given."""
    return (steps + grid.zero_point).to(torch.int32)


def _logits_hook(
    check: OperatorCheck, products: AttentionProducts, attention: _Attention
) -> Callable[..., None]:
    def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        query, key, *_ = inputs
        accumulator = products.accumulate_logits(
            _codes(query, products.query_grid), _codes(key, products.key_grid)
        )
        check.add_sums(accumulator, query.double() @ key.double().transpose(-1, -2))
        levels = products.query_grid.grid.levels
        check.add_floats(products.logits(accumulator), output, levels)

    return hook


def _values_hook(
    check: OperatorCheck, products: AttentionProducts, attention: _Attention
) -> Callable[..., None]:
    encoder = isinstance(attention, QuantizedEncoderAttention)
    projection = cast(QuantizedLinear, attention.proj if encoder else attention.out_proj)
    following = projection.input_quantizer

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weights, value, *_ = inputs
        if products.points is not None:
            ascending = products.points.flip(0)
            codes = len(ascending) - 1 - torch.searchsorted(ascending, weights.long().contiguous())
        else:
            codes = _codes(weights, cast(UniformGrid, products.softmax_grid))
        accumulator = products.accumulate_values(codes, _codes(value, products.value_grid))
        check.add_sums(accumulator, weights.double() @ value.double())
        check.add_codes(products.requantize(accumulator), following.codes(output))

    return hook
