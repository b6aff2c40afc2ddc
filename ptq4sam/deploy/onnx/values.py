"""Tensors of a graph, float or as integer codes, and the way from one to the other."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptq4sam.deploy.onnx.graph import Graph
from ptq4sam.errors import ExportError
from ptq4sam.methods.adaptive_granularity import FLOOR, AdaptiveGranularityQuantizer
from ptq4sam.quantization.base import EPS, AffineQuantizer, FixedQuantizer, Mode, Quantizer
from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.quantizers import LSQPlusQuantizer, LSQQuantizer
from ptq4sam.quantization.rounding import AdaRoundQuantizer

_CONTAINER_BITS = 8


@dataclass(frozen=True)
class Affine:
    """What integer codes mean: (code - zero_point) * scale.

    Attributes:
        scale: [] or [channels], float32.
        zero_point: integers of the codes' type, as `scale` shaped.
    """

    scale: NDArray[np.float32]
    zero_point: NDArray[np.integer]


@dataclass(frozen=True)
class Value:
    """A tensor of the graph: float where `affine` is None, else codes."""

    name: str
    affine: Affine | None = None

    def renamed(self, name: str) -> Value:
        """The same numbers at other places (reshaped, transposed, sliced)."""
        return replace(self, name=name)


def dequantize(graph: Graph, value: Value, path: str, factor: float = 1.0) -> str:
    """The float tensor of a value, times a factor."""
    if value.affine is None:
        if factor == 1.0:
            return value.name
        return graph.node("Mul", [value.name, graph.number(factor)], f"{path}.scaled")
    scale = (value.affine.scale * np.float32(factor)).astype(np.float32)
    inputs = [
        value.name,
        graph.constant(f"{path}.scale", scale),
        graph.constant(f"{path}.zero_point", value.affine.zero_point),
    ]
    return graph.node("DequantizeLinear", inputs, f"{path}.dequantized")


def quantize(graph: Graph, x: str, quantizer: Quantizer | None, path: str) -> Value:
    """Codes of a float tensor, as the quantizer gives them; None leaves it float.

    Codes of fewer than 8 bits are held in 8: the tensor is cut to their range first.

    Raises:
        ExportError: the quantizer's grid has no exact form.
    """
    if quantizer is None:
        return Value(x)
    if isinstance(quantizer, AdaptiveGranularityQuantizer):
        return Value(_adaptive_granularity(graph, x, quantizer, path))
    affine = activation_format(quantizer, path)
    grid = quantizer.grid
    if grid.bits < _CONTAINER_BITS:
        low, high = (
            graph.number(float(np.float32(code - int(affine.zero_point)) * affine.scale))
            for code in (grid.qmin, grid.qmax)
        )
        x = graph.node("Clip", [x, low, high], f"{path}.clipped")
    inputs = [
        x,
        graph.constant(f"{path}.scale", affine.scale),
        graph.constant(f"{path}.zero_point", affine.zero_point),
    ]
    return Value(graph.node("QuantizeLinear", inputs, f"{path}.codes"), affine)


def activation_format(quantizer: Quantizer, path: str) -> Affine:
    """Scale and zero point of an activation's quantizer.

    Raises:
        ExportError: it has no scale, one for each channel, more than 8 bits, or is none of ours.
    """
    scale, zero_point = affine_parameters(quantizer, path)
    if scale.dim() > 0:
        raise ExportError(
            f"{path} has a scale for each channel of an activation, which no integer product takes:"
            " quantize activations per tensor"
        )
    _check_bits(quantizer.grid, path)
    dtype = np.int8 if quantizer.grid.symmetric else np.uint8
    return Affine(_float32(scale), np.array(int(zero_point), dtype))


def weight_codes(
    quantizer: Quantizer, weight: Tensor, path: str
) -> tuple[NDArray[np.int8], Affine]:
    """Codes of a weight [out, ...] as int8, and what they mean, one scale a channel or in all.

    Distances from the zero point are kept where they fit, so that the codes need no zero point:
    then runtimes have an integer product for them. That is so up to 7 bits, and for symmetric grids.

    Raises:
        ExportError: as for `activation_format`.
    """
    scale, zero_point = affine_parameters(quantizer, path)
    _check_bits(quantizer.grid, path)
    codes = quantizer.codes(weight)
    zeros = zero_point.to(torch.int32)
    shape = [-1, *[1] * (weight.dim() - 1)] if zeros.dim() else []
    distance = codes - zeros.reshape(shape)
    if int(distance.min()) >= -128 and int(distance.max()) <= 127:
        shifted, zeros = distance, torch.zeros_like(zeros)
    else:
        shifted, zeros = codes - 128, zeros - 128
    return _int8(shifted), Affine(_float32(scale), _int8(zeros))


def affine_parameters(quantizer: Quantizer, path: str) -> tuple[Tensor, Tensor]:
    """Scale and zero point that a quantizer computes with.

    Raises:
        ExportError: it is not an affine quantizer that quantizes.
    """
    if quantizer.mode is not Mode.QUANTIZE or not quantizer.is_calibrated:
        raise ExportError(f"{path} has no scale or is off: calibrate and freeze the model first")
    if quantizer.drop_probability > 0:
        raise ExportError(
            f"{path} lets elements through at random: such a model has no exact form; quantize "
            "with compat: faithful"
        )
    if isinstance(quantizer, LSQPlusQuantizer):
        zero_point = quantizer.zero_point.round().clamp(quantizer.grid.qmin, quantizer.grid.qmax)
        return quantizer.scale.detach().abs().clamp(min=EPS), zero_point.detach()
    if isinstance(quantizer, LSQQuantizer):
        return quantizer.scale.detach().abs().clamp(min=EPS), quantizer.zero_point
    if isinstance(quantizer, AdaRoundQuantizer) and quantizer.rounding == "soft":
        raise ExportError(f"{path} rounds softly, off its grid: freeze the model first")
    if type(quantizer) in (FixedQuantizer, AdaRoundQuantizer, AffineQuantizer):
        return quantizer.scale, quantizer.zero_point
    raise ExportError(
        f"{path} is a {type(quantizer).__name__}, for which no exact form is known: use a scheme "
        "with one of the quantizers of ptq4sam/quantization/scheme.py"
    )


def _adaptive_granularity(
    graph: Graph, x: str, quantizer: AdaptiveGranularityQuantizer, path: str
) -> str:
    """Softmax outputs moved to their powers of 2^(1/tau): code by logarithm, value by table.

    The table's last entry, one beyond the grid, is the zero of what is too small.
    """
    if quantizer.mode is not Mode.QUANTIZE or not quantizer.is_calibrated:
        raise ExportError(f"{path} has no scale or is off: calibrate and freeze the model first")
    scale, tau, levels = quantizer.scale.detach().abs().clamp(min=EPS), quantizer.tau, 0
    levels = quantizer.grid.levels
    points = torch.arange(levels).div(-tau).exp2().mul(scale)
    table = graph.constant(f"{path}.points", np.append(_float32(points), np.float32(0)))
    largest = float(np.finfo(np.float32).max)
    floored = graph.node("Clip", [x, graph.number(FLOOR), graph.number(largest)], f"{path}.floored")
    ratio = graph.node("Div", [floored, graph.number(float(scale))], f"{path}.ratio")
    logarithm = graph.node("Log", [ratio], f"{path}.logarithm")
    steps = graph.node("Mul", [logarithm, graph.number(-float(tau) / math.log(2))], f"{path}.steps")
    rounded = graph.node("Round", [steps], f"{path}.rounded")
    codes = graph.node(
        "Clip", [rounded, graph.number(0.0), graph.number(float(levels))], f"{path}.clipped"
    )
    int32 = 6  # TensorProto.INT32
    indices = graph.node("Cast", [codes], f"{path}.codes", to=int32)
    return graph.node("Gather", [table, indices], f"{path}.values", axis=0)


def _check_bits(grid: Grid, path: str) -> None:
    if grid.bits > _CONTAINER_BITS:
        raise ExportError(
            f"{path} has {grid.bits} bits, integer kernels take up to 8: quantize to fewer"
        )


def _float32(x: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = x.detach().cpu().float().numpy()
    return array


def _int8(x: Tensor) -> NDArray[np.int8]:
    array: NDArray[np.int8] = x.detach().cpu().to(torch.int8).numpy()
    return array
