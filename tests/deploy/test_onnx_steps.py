from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ptq4sam.deploy.onnx.graph import Graph
from ptq4sam.deploy.onnx.layers import mlp_block
from ptq4sam.deploy.onnx.steps import find_steps, quantized_gelu
from ptq4sam.model.layers import QuantizedLinear, put_weights_on_grid
from ptq4sam.model.rounding_once import RoundedGELU
from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.modes import quantizer_mode
from ptq4sam.quantization.quantizers import FixedQuantizer, Mode
from ptq4sam.sam.common import MLPBlock
from tests.deploy.runtime_graphs import onnxruntime_operators, run_graph


def near_every_float(x: torch.Tensor) -> torch.Tensor:
    """The floats beside each of `x`, and these themselves."""
    ends = [torch.nextafter(x, torch.tensor(end)) for end in (-torch.inf, torch.inf)]
    return torch.cat([x, *ends])


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("largest", [0.3, 5.0, 90.0])
def test_quantized_gelus_are_those_of_the_simulation(
    bits: int, symmetric: bool, largest: float, tmp_path: Path
) -> None:
    quantizer, gelu = FixedQuantizer(Grid(bits, symmetric)), RoundedGELU()
    with quantizer_mode(quantizer, Mode.OBSERVE), torch.no_grad():
        quantizer(torch.tensor([-0.17, largest]))
    generator = torch.Generator().manual_seed(bits)
    x = 3 * torch.randn(40000, generator=generator)
    special = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e6, -1e6, 1e30, -1e30, -0.7517916])
    # Inputs around those at which the float64 GELU is in the middle of two points.
    middles = (torch.arange(-200, 200) + 0.5) * quantizer.step
    x = torch.cat([x, special, near_every_float(middles)])
    x = x[: len(x) // 8 * 8].reshape(8, -1)
    graph = Graph("gelu")
    value = quantized_gelu(graph, graph.input("x", np.float32, x.shape), gelu, quantizer, "act", 8)
    assert value is not None
    assert value.affine is not None
    graph.output("y", value.name, np.uint8, x.shape)
    found = run_graph(graph, "onnxruntime", tmp_path, {"x": x.numpy()})[0].astype(np.int32)
    with torch.no_grad():
        wanted = quantizer.steps(gelu(x))
    np.testing.assert_array_equal(found - int(value.affine.zero_point), wanted.numpy())


def test_steps_that_turn_within_a_cell_are_found() -> None:
    """A dip that is narrower than the distance of two changes."""

    def codes(x: torch.Tensor) -> torch.Tensor:
        return (x > 0.5).int() - ((x > -1.0001) & (x < -0.9999)).int()

    steps = find_steps(codes, -2.0, 1.0, 0.5, turns=[-1.0])
    assert steps is not None
    x = near_every_float(torch.tensor([-1.0001, -1.0, -0.9999, 0.5, 0.0]))
    assert torch.equal(steps(x), codes(x))


def test_steps_too_fine_for_a_table_are_none() -> None:
    assert find_steps(lambda x: (x * 1e6).floor().clamp(0, 255), -8.0, 1.0, 1e-7) is None


def test_a_quantized_mlp_is_that_of_the_simulation(tmp_path: Path) -> None:
    """To the bit, and its second product is one of integers."""
    torch.manual_seed(0)
    block, x = MLPBlock(48, 96), 2 * torch.randn(1, 8, 8, 48)
    block.act = RoundedGELU()
    for name in ("lin1", "lin2"):
        layer = QuantizedLinear(
            getattr(block, name), FixedQuantizer(Grid(8), channel_axis=0), FixedQuantizer(Grid(8))
        )
        setattr(block, name, layer)
    with torch.no_grad():
        with quantizer_mode(block, Mode.OBSERVE):
            block(x)
        put_weights_on_grid(block)
        wanted = block(x)
    graph = Graph("mlp")
    y = mlp_block(graph, block, graph.input("x", np.float32, x.shape), "mlp", parts=8)
    graph.output("y", y, np.float32, x.shape)
    found = run_graph(graph, "onnxruntime", tmp_path, {"x": x.numpy()})[0]
    np.testing.assert_array_equal(found, wanted.numpy())
    assert onnxruntime_operators(tmp_path / "graph.onnx", tmp_path)["MatMulIntegerToFloat"] == 2


def test_a_rounded_gelu_is_torchs() -> None:
    x = torch.linspace(-9, 9, 10001)
    with torch.no_grad():
        assert torch.equal(RoundedGELU()(x), nn.functional.gelu(x.double()).float())
    x.requires_grad_(True)
    assert torch.equal(RoundedGELU()(x), nn.functional.gelu(x))
