from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from ptq4sam.deploy.onnx.graph import Graph
from ptq4sam.deploy.onnx.layers import convolution, linear
from ptq4sam.deploy.onnx.lowering import lowered
from ptq4sam.deploy.onnx.points import first_outputs, looked_up, point_codes, points_of
from ptq4sam.deploy.onnx.values import quantize, steps_of
from ptq4sam.deploy.targets import onnxruntime
from ptq4sam.errors import DeployError
from ptq4sam.methods.adaptive_granularity import AdaptiveGranularityQuantizer
from ptq4sam.methods.grouped import GroupedQuantizer
from ptq4sam.methods.hybrid import HybridQuantizer
from ptq4sam.methods.lnq import LnqQuantizer
from ptq4sam.operators.base import put_weights_on_grid
from ptq4sam.operators.convolution import PortableConv2d, QuantizedConv2d
from ptq4sam.operators.linear import QuantizedLinear
from ptq4sam.operators.norm import LayerNorm2d, PortableLayerNorm, PortableLayerNorm2d
from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.modes import quantizer_mode
from ptq4sam.quantization.quantizers import (
    FixedQuantizer,
    LSQPlusQuantizer,
    Mode,
    Quantizer,
)
from tests.deploy.runtime_graphs import (
    RUNTIMES,
    dialect,
    given,
    onnxruntime_operators,
    openvino_precisions,
    run_graph,
)

pytestmark = pytest.mark.parametrize("runtime", RUNTIMES)


def calibrated(quantizer: Quantizer, x: torch.Tensor, *more: torch.Tensor) -> Quantizer:
    with quantizer_mode(quantizer, Mode.OBSERVE):
        quantizer(x, *more)
    return quantizer.requires_grad_(False)


def in_graph(make: Callable[[Graph, str], str], x: torch.Tensor, runtime: str, folder: Path) -> Any:
    """What a runtime makes of nodes that are made from a tensor."""
    graph = Graph("quantizer", dialect(runtime))
    y = make(graph, graph.input("x", np.float32, x.shape))
    graph.output("y", y, np.float32, x.shape)
    return run_graph(graph, runtime, folder, {"x": x.numpy()})[0]


def exported(quantizer: Quantizer, x: torch.Tensor, runtime: str, folder: Path) -> Any:
    """Steps of a quantizer in a runtime."""

    def make(graph: Graph, name: str) -> str:
        return steps_of(graph, quantize(graph, name, quantizer, "quantizer"), "quantizer")

    return in_graph(make, x, runtime, folder)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_activations_are_moved_to_the_points_of_the_simulation(
    bits: int, symmetric: bool, runtime: str, tmp_path: Path
) -> None:
    torch.manual_seed(bits)
    x = torch.randn(50_000) + 0.3
    quantizer = calibrated(FixedQuantizer(Grid(bits, symmetric)), x[:500].clone())
    # Beyond the range of calibration too: there the codes are cut. And in the middle of two codes.
    middles = (torch.arange(-300, 300) + 0.5) * quantizer.step
    beside = [torch.nextafter(middles, torch.tensor(end)) for end in (-torch.inf, torch.inf)]
    x = torch.cat([2 * x, middles, *beside])
    found = exported(quantizer, x, runtime, tmp_path)
    np.testing.assert_array_equal(found, quantizer.steps(x).numpy())


def test_a_learned_zero_point_is_used_as_a_code(runtime: str, tmp_path: Path) -> None:
    x = torch.randn(1000)
    quantizer = calibrated(LSQPlusQuantizer(Grid(4)), x)
    quantizer.zero_point.data.fill_(6.6)
    found = exported(quantizer, x, runtime, tmp_path)
    np.testing.assert_array_equal(found, quantizer.steps(x).numpy())


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_a_hybrid_grid_has_the_points_of_the_simulation(
    bits: int, runtime: str, tmp_path: Path
) -> None:
    torch.manual_seed(bits)
    x = nn.functional.gelu(2 * torch.randn(50_000))
    quantizer = HybridQuantizer(Grid(bits))
    calibrated(quantizer, x[:500].clone())
    # Around the ends of all codes, and beyond the range of calibration.
    points = quantizer.grid_in_use().points().float()
    between = (points[1:] + points[:-1]) / 2
    ends = (
        quantizer.grid_in_use().numbers.ends[:8] - quantizer.grid_in_use().zero
    ) * quantizer.step
    hard = torch.cat([points, between, ends[ends < 1e6]])
    beside = [torch.nextafter(hard, torch.tensor(end)) for end in (-torch.inf, torch.inf)]
    x = torch.cat([2 * x, hard, *beside])
    found = exported(quantizer, x, runtime, tmp_path)
    np.testing.assert_array_equal(found, quantizer.steps(x).numpy())


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_a_table_has_the_points_of_the_simulation(bits: int, runtime: str, tmp_path: Path) -> None:
    torch.manual_seed(bits)
    x = (3 * torch.randn(8, 100, 60)).softmax(-1)
    quantizer = LnqQuantizer(Grid(bits))
    calibrated(quantizer, x, torch.randn(8, 60, 16))
    ends = quantizer.ends
    beside = torch.stack([ends, torch.nextafter(ends, torch.tensor(0.0))]).flatten()
    x[7].view(-1)[: len(beside)] = beside
    found = exported(quantizer, x, runtime, tmp_path)
    np.testing.assert_array_equal(found, quantizer.steps(x).numpy())


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_a_grouped_grid_has_the_points_of_the_simulation(
    bits: int, runtime: str, tmp_path: Path
) -> None:
    torch.manual_seed(bits)
    x = torch.randn(500, 12) * torch.logspace(-2, 0, 12) + torch.linspace(-1, 2, 12)
    quantizer = calibrated(GroupedQuantizer(Grid(bits)), x, torch.randn(12, 3))
    points = quantizer.grid_in_use().points().float().t()
    between = (points[1:] + points[:-1]) / 2
    beside = [torch.nextafter(between, torch.tensor(end)) for end in (-torch.inf, torch.inf)]
    x = torch.cat([2 * x, points, between, *beside])
    found = exported(quantizer, x, runtime, tmp_path)
    np.testing.assert_array_equal(found, quantizer.steps(x).numpy())


def test_a_hybrid_grid_of_more_than_bytes_is_refused(runtime: str, tmp_path: Path) -> None:
    x = torch.randn(1000)
    quantizer = calibrated(HybridQuantizer(Grid(8)), x)
    with pytest.raises(
        DeployError, match=r"quantizer has a hybrid grid of 8 bits, .* up to 6 bits"
    ):
        exported(quantizer, x, runtime, tmp_path)


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_softmax_outputs_are_moved_to_the_powers_of_the_simulation(
    bits: int, runtime: str, tmp_path: Path
) -> None:
    torch.manual_seed(bits)
    attention = (4 * torch.randn(8, 100, 60)).softmax(-1)
    attention[0, 0, :3] = torch.tensor([0.0, 1e-30, 1.0])
    quantizer = AdaptiveGranularityQuantizer(Grid(bits))
    calibrated(quantizer, attention, torch.randn(8, 60, 16))
    first = first_outputs(quantizer)
    beside = torch.stack([first, torch.nextafter(first, torch.tensor(0.0))]).flatten()
    attention[7].view(-1)[: len(beside)] = beside
    grid = quantizer.grid_in_use()

    def make(graph: Graph, name: str) -> str:
        codes = point_codes(graph, name, quantizer, grid, "quantizer", parts=8)
        table = points_of(grid)
        return looked_up(graph, codes, table, name, "points", parts=8)

    found = in_graph(make, attention, runtime, tmp_path)
    np.testing.assert_array_equal(found, quantizer.steps(attention).float().numpy())
    assert found[0, 0, 0] == found[0, 0, 1] == 0


def quantized_linear(
    weight_grid: Grid, input_grid: Grid, x: torch.Tensor, bias: bool = True
) -> QuantizedLinear:
    layer = QuantizedLinear(
        nn.Linear(x.shape[-1], 24, bias=bias),
        FixedQuantizer(weight_grid, channel_axis=0),
        FixedQuantizer(input_grid),
    )
    calibrated(layer.weight_quantizer, layer.weight)
    calibrated(layer.input_quantizer, x)
    put_weights_on_grid(layer)
    return layer.requires_grad_(False)


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_is_that_of_the_simulation(
    bits: int, symmetric: bool, bias: bool, runtime: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 30, 40)
    grid = Grid(bits, symmetric)
    layer = quantized_linear(grid, grid, x, bias)
    graph = Graph("linear", dialect(runtime))
    graph.output("y", linear(graph, layer, given(graph, x)).name, np.float32, [2, 30, 24])
    found = run_graph(graph, runtime, tmp_path, {"x": x.numpy()})[0]
    with torch.no_grad():
        np.testing.assert_array_equal(found, layer(x).numpy())


@pytest.mark.parametrize("bits", [4, 8])
def test_a_convolution_is_that_of_the_simulation(bits: int, runtime: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 8, 9, 11)
    layer = QuantizedConv2d(
        nn.Conv2d(8, 12, 3, padding=1, bias=False),
        FixedQuantizer(Grid(bits), channel_axis=0),
        FixedQuantizer(Grid(bits)),
    )
    calibrated(layer.weight_quantizer, layer.weight)
    calibrated(layer.input_quantizer, x)
    put_weights_on_grid(layer)
    layer.requires_grad_(False)
    graph = Graph("convolution", dialect(runtime))
    y = convolution(graph, layer, given(graph, x))
    graph.output("y", y.name, np.float32, [1, 12, 9, 11])
    found = run_graph(graph, runtime, tmp_path, {"x": x.numpy()})[0]
    with torch.no_grad():
        np.testing.assert_array_equal(found, layer(x).numpy())


def constants(layer: QuantizedLinear, path: Path) -> dict[str, onnx.TensorProto]:
    graph = Graph("layer", onnxruntime.DIALECT)
    y = linear(graph, layer, given(graph, torch.empty(1, 5, 40)))
    graph.output("y", y.name, np.float32, [1, 5, 24])
    graph.write(path, {})
    return {constant.name: constant for constant in onnx.load(path).graph.initializer}


def test_weights_of_6_bits_are_bytes(runtime: str, tmp_path: Path) -> None:
    layer = quantized_linear(Grid(6), Grid(6), torch.randn(1, 5, 40))
    found = constants(layer, tmp_path / "g.onnx")
    codes = onnx.numpy_helper.to_array(found["layer.weight"])
    scale = onnx.numpy_helper.to_array(found["layer.weight.scale"])
    assert codes.dtype == np.int8
    assert "layer.weight.zero_point" not in found
    assert np.array_equal(codes * scale, layer.weight.t().numpy())
    input_scale = onnx.numpy_helper.to_array(found["layer.input.scale"])
    assert input_scale == layer.input_quantizer.scale.numpy()


@pytest.mark.parametrize("symmetric", [False, True])
def test_weights_of_4_bits_are_half_bytes(symmetric: bool, runtime: str, tmp_path: Path) -> None:
    layer = quantized_linear(Grid(4, symmetric), Grid(4), torch.randn(1, 5, 40))
    found = constants(layer, tmp_path / "g.onnx")
    assert found["layer.weight"].data_type == onnx.TensorProto.UINT4
    assert len(found["layer.weight"].raw_data) == 40 * 24 // 2
    codes = onnx.numpy_helper.to_array(found["layer.weight"]).astype(np.int32)
    zero = onnx.numpy_helper.to_array(found["layer.weight.zero"])
    scale = onnx.numpy_helper.to_array(found["layer.weight.scale"])
    weight = (codes - zero).astype(np.float32) * scale
    assert np.array_equal(weight, layer.weight.t().numpy())


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_a_linear_layer_runs_on_integers(bits: int, runtime: str, tmp_path: Path) -> None:
    path = tmp_path / "g.onnx"
    constants(quantized_linear(Grid(bits, bits == 8), Grid(bits), torch.randn(1, 5, 40)), path)
    if runtime == "onnxruntime":
        assert onnxruntime_operators(path, tmp_path)["MatMulIntegerToFloat"] == 1
    else:
        kinds = ("MatMul", "FullyConnected", "FullyConnectedQuantizedLegacy")
        assert set(openvino_precisions(path, kinds)) <= {"i8", "u8"}


def test_a_kernel_of_wide_weights_is_named(runtime: str) -> None:
    """Its sums are more than float32 holds, however they are cut."""
    torch.manual_seed(0)
    x = torch.randn(1, 8, 9, 11)
    layer = QuantizedConv2d(
        nn.Conv2d(8, 8, 3, groups=8),
        FixedQuantizer(Grid(16), channel_axis=0),
        FixedQuantizer(Grid(8)),
    )
    calibrated(layer.weight_quantizer, layer.weight)
    calibrated(layer.input_quantizer, x)
    put_weights_on_grid(layer)
    graph = Graph("convolution", dialect(runtime))
    with pytest.raises(DeployError, match=r"convolution\.weight has 16 bits"):
        convolution(graph, layer.requires_grad_(False), given(graph, x))


def test_what_has_no_exact_form_is_named(runtime: str) -> None:
    x = torch.randn(1, 5, 40)
    graph = Graph("refused", dialect(runtime))
    traced = given(graph, x)
    wide = calibrated(FixedQuantizer(Grid(9)), x)
    with pytest.raises(DeployError, match=r"blocks.3.attn has 9 bits"):
        quantize(graph, "x", wide, "blocks.3.attn")
    channels = calibrated(FixedQuantizer(Grid(8), channel_axis=2), x)
    with pytest.raises(DeployError, match="one scale"):
        quantize(graph, "x", channels, "q")
    dropping = calibrated(FixedQuantizer(Grid(8)), x)
    dropping.drop_probability = 0.5
    with pytest.raises(DeployError, match="at random"):
        quantize(graph, "x", dropping, "q")
    layer = quantized_linear(Grid(8), Grid(8), x)
    layer.weight[0, 0] += 1e-3
    with pytest.raises(DeployError, match="not on its grid"):
        linear(graph, layer, traced).name  # noqa: B018
    deep = quantized_linear(Grid(12), Grid(8), x)
    for module, found in (
        (nn.Sequential(nn.Identity(), deep), r"decoder\.1\.weight has 12 bits"),
        (nn.Sequential(nn.Softplus()), r"decoder\.0 calls torch's softplus"),
        (nn.Sequential(nn.Conv1d(5, 5, 3)), r"decoder\.0 calls torch's conv1d"),
        (nn.Sequential(nn.Conv2d(5, 5, 3, padding="same")), r"decoder\.0 is a convolution"),
    ):
        before = dict(vars(module[0]))
        with pytest.raises(DeployError, match=found) as refused, lowered(graph, module, "decoder"):
            module(traced).name  # noqa: B018
        assert "\n" not in str(refused.value)
        assert vars(module[0]) == before


def test_norms_and_patches_are_those_of_the_simulation(runtime: str, tmp_path: Path) -> None:
    """To the bit."""
    torch.manual_seed(0)
    norm, over_channels = nn.LayerNorm(48), LayerNorm2d(48)
    for parameter in (*norm.parameters(), *over_channels.parameters()):
        nn.init.normal_(parameter)
    modules = nn.ModuleList(
        [
            PortableConv2d(nn.Conv2d(3, 48, 8, 8)),
            PortableLayerNorm(norm),
            PortableLayerNorm2d(over_channels),
        ]
    )

    def through(x: Any) -> Any:
        x = modules[1](modules[0](x).permute(0, 2, 3, 1))
        return modules[2](x.permute(0, 3, 1, 2))

    image = torch.randn(1, 3, 64, 64)
    graph = Graph("floats", dialect(runtime))
    with lowered(graph, modules, "floats"):
        y = through(given(graph, image))
    assert y.exact
    graph.output("y", y.name, np.float32, (1, 48, 8, 8))
    found = torch.from_numpy(run_graph(graph, runtime, tmp_path, {"x": image.numpy()})[0])
    with torch.no_grad():
        assert torch.equal(found, through(image))
