"""Which products of codes are exact in a runtime on this processor: the runtime is asked.

Without instructions that add four products of bytes into an int32 (VNNI, AMX), runtimes add them in
pairs that saturate at 16 bits. No table of processors says where: operators as exports have them
multiply the largest codes, in a session as exports are opened.
"""

from __future__ import annotations

import functools
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ptq4sam.deploy.onnx.graph import Graph
from ptq4sam.deploy.onnx.layers import convolution, linear
from ptq4sam.deploy.onnx.traced import Traced
from ptq4sam.deploy.onnx.values import dequantize, quantize, steps_of
from ptq4sam.deploy.targets.dialect import Dialect
from ptq4sam.deploy.targets.target import Arrays, Products, Target
from ptq4sam.errors import DeployError
from ptq4sam.operators.convolution import QuantizedConv2d
from ptq4sam.operators.linear import QuantizedLinear
from ptq4sam.quantization.affine import FixedQuantizer
from ptq4sam.quantization.base import Mode, Quantizer
from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.modes import quantizer_mode

_log = logging.getLogger(__name__)

Run = Callable[[Path, Sequence[str], Arrays], Sequence[NDArray[Any]]]
"""Some outputs of an ONNX file in a runtime."""

_TERMS, _CHANNELS, _SIDE = 64, 16, 5
_SYMMETRIC, _ASYMMETRIC = Grid(8, symmetric=True), Grid(8)
_GRIDS = ((_SYMMETRIC, _SYMMETRIC), (_ASYMMETRIC, _SYMMETRIC), (_ASYMMETRIC, _ASYMMETRIC))
"""Of activations and weights: graphs hold each pair in another way."""


def exact_products(target: Target, held: Products | None = None) -> Products:
    """The fastest products of codes that are exact in a runtime on this processor.

    Args:
        target: the runtime.
        held: products that the exported file itself has, if not int8.

    Raises:
        DeployError: none are.
        DependencyError: the runtime, or onnx, is not installed.
    """
    candidates = (held,) if held in target.held else target.products
    for products in candidates:
        if _is_exact(target, products):
            return products
    raise DeployError(
        f"{target.name} multiplies codes inexactly on this processor, whether as "
        f"{' or '.join(candidates)}: use the quantized file in torch, or a "
        "fast export, which promises no codes"
    )


def advice(target: Target) -> str | None:
    """What to know of INT8 in a runtime on this processor; None where it is what it should be."""
    if _is_exact(target, "int8"):
        return None
    return (
        "int8 products saturate on this processor (it has no VNNI): exact exports multiply in "
        f"{target.products[-1]}, and a float32 export is as fast as INT8 of any kind or faster "
        "(docs/deployment.md)"
    )


@functools.cache
def _is_exact(target: Target, products: Products) -> bool:
    def run(path: Path, outputs: Sequence[str], inputs: Arrays) -> Sequence[NDArray[Any]]:
        return target.open(path, outputs, "f32", products).run(inputs)

    exact = multiplies_exactly(run, target.dialect)
    _log.debug("%s: %s products are%s exact here", target.name, products, "" if exact else " not")
    return exact


@torch.no_grad()
def multiplies_exactly(run: Run, dialect: Dialect) -> bool:
    """Whether a runtime's products of the largest codes are exact.

    Args:
        run: the runtime.
        dialect: of its exact exports.
    """
    graph, inputs = Graph("probe", dialect), _inputs()
    for name, x in inputs.items():
        graph.input(name, np.float32, x.shape)
    expected: dict[str, Tensor] = {}
    for activations, weights in _GRIDS:
        made = _products(graph, inputs, activations, weights)
        for source, wanted in made:
            name = f"sums.{len(expected)}"
            graph.output(name, source, np.float32, wanted.shape)
            expected[name] = wanted.float()
    with tempfile.TemporaryDirectory(prefix="ptq4sam.") as folder:
        path = Path(folder) / "probe.onnx"
        graph.write(path, {})
        found = run(path, list(expected), {name: x.numpy() for name, x in inputs.items()})
    return all(
        np.array_equal(ours, wanted.numpy())
        for ours, wanted in zip(found, expected.values(), strict=True)
    )


def _inputs() -> dict[str, Tensor]:
    """Numbers beyond all grids, so that their codes are those at the ends: most at the upper."""
    rows = (
        torch.tensor([1e3, 1e3, 1e3, -1e3], device="cpu")
        .repeat(_TERMS // 4)[:, None]
        .expand(-1, _TERMS)
    )
    return {
        "rows": rows[None].contiguous(),
        "places": torch.full((1, _CHANNELS, _SIDE, _SIDE), 1e3, device="cpu"),
    }


def _products(
    graph: Graph, inputs: Mapping[str, Tensor], activations: Grid, weights: Grid
) -> list[tuple[str, Tensor]]:
    """A linear layer, a convolution and a product of activations: their tensors and values."""
    given, held = _quantizer(activations), _quantizer(weights)
    rows, places = (given.steps(inputs[name]).double() for name in ("rows", "places"))
    # On the meta device no random numbers are drawn.
    source = nn.Linear(_TERMS, _TERMS, bias=False, device="meta")
    layer = QuantizedLinear(source, held, given)
    layer.weight = nn.Parameter(_ends(held, _TERMS))
    convolved = nn.Conv2d(_CHANNELS, _CHANNELS, 3, padding=1, bias=False, device="meta")
    convolved.weight = nn.Parameter(_ends(held, _CHANNELS)[:, :, None, None].repeat(1, 1, 3, 3))
    take = steps_of if graph.multiplies_steps else dequantize
    left, right = (
        take(graph, quantize(graph, "rows", given, path), path) for path in ("left", "right")
    )
    right = graph.transpose(right, (0, 2, 1), "right.turned")
    x, y = (Traced(graph, name, inputs[name].shape) for name in ("rows", "places"))
    return [
        (linear(graph, layer, x).name, rows @ layer.weight.double().t()),
        (
            convolution(graph, QuantizedConv2d(convolved, held, given), y).name,
            nn.functional.conv2d(places, convolved.weight.double(), padding=1),
        ),
        (graph.node("MatMul", [left, right], "product"), rows @ rows.transpose(1, 2)),
    ]


def _ends(quantizer: Quantizer, size: int) -> Tensor:
    """A matrix of weights at the ends of their grid: rows of one, and of both in turns."""
    ends = quantizer(torch.tensor([1e3, -1e3], device="cpu"))
    same = ends.repeat(size // 4)[:, None].expand(-1, size)
    return torch.cat([same, ends.repeat(size // 2, size // 2)])


def _quantizer(grid: Grid) -> Quantizer:
    """One whose scale is 1, and whose zero point is 1 where the grid has one."""
    quantizer = FixedQuantizer(grid)
    low = -127.5 if grid.symmetric else -1.0
    with quantizer_mode(quantizer, Mode.OBSERVE):
        quantizer(torch.tensor([low, low + 255], device="cpu"))
    return quantizer
