"""Networks that no line of deploy/ knows are exported by their own forward."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq4sam.deploy.onnx.graph import Graph
from ptq4sam.deploy.onnx.layers import convolution
from ptq4sam.deploy.onnx.lowering import lowered
from ptq4sam.deploy.targets import openvino
from ptq4sam.errors import DeployError
from ptq4sam.operators.activation import PortableGELU
from ptq4sam.operators.attention import QuantizedSoftmaxAttention, SoftmaxAttention
from ptq4sam.operators.base import put_weights_on_grid
from ptq4sam.operators.bias import TableBias
from ptq4sam.operators.convolution import QuantizedConv2d
from ptq4sam.operators.linear import QuantizedLinear
from ptq4sam.operators.norm import PortableLayerNorm
from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.modes import quantizer_mode
from ptq4sam.quantization.quantizers import FixedQuantizer, Mode
from tests.deploy.runtime_graphs import RUNTIMES, dialect, given, relative_error, run_graph

SIDE, DIM, HEADS = 12, 16, 2


class Mixed(nn.Module):
    """What hierarchical encoders have: strides, depthwise convolutions, windows, odd splits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, DIM, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(DIM, DIM, 3, padding=1, groups=DIM)
        self.norm = nn.LayerNorm(DIM)
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.out = nn.Linear(DIM, DIM)
        self.act = nn.GELU()
        self.table = nn.Parameter(torch.randn(1, 1, 1, DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        x = x + self.depthwise(x)
        x = x.permute(0, 2, 3, 1) * 0.5 + self.table
        windows = self.windows(self.norm(x))
        # As in TinyViT: query, key and value lie side by side in each head.
        heads = self.qkv(windows).view(len(windows), -1, HEADS, 3 * DIM // HEADS)
        query, key, value = heads.split([DIM // HEADS] * 3, dim=3)
        weights = (query.transpose(1, 2) @ key.permute(0, 2, 3, 1)).softmax(-1)
        attended = (weights @ value.transpose(1, 2)).transpose(1, 2).reshape(*windows.shape)
        grid = self.out(attended).view(2, 2, 4, 4, DIM).transpose(1, 2).reshape(1, 8, 8, DIM)
        x = x + grid[:, :6, :6]
        halves = torch.cat([part.flatten(1, 2) for part in x.chunk(2, dim=-1)], dim=-1)
        mean = halves.mean(1, keepdim=True)
        return torch.stack([(halves - mean)[..., ::2], 1 - halves[..., 1::2]], dim=1).relu()

    def windows(self, x: Tensor) -> Tensor:
        """Four windows of 4 x 4 of 6 x 6 cells."""
        x = F.pad(x, (0, 0, 0, 2, 0, 2))
        return x.view(1, 2, 4, 2, 4, DIM).transpose(2, 3).reshape(4, 16, DIM)


def network() -> Mixed:
    torch.manual_seed(0)
    return Mixed().eval().requires_grad_(False)


def image() -> Tensor:
    return torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def exported(module: nn.Module, x: Tensor, runtime: str, folder: Path) -> tuple[Graph, Any]:
    graph = Graph("network", dialect(runtime))
    with lowered(graph, module, "network"):
        y = module(given(graph, x))
    with torch.no_grad():
        assert y.shape == module(x).shape
    graph.output("y", y.name, np.float32, y.shape)
    return graph, run_graph(graph, runtime, folder, {"x": x.numpy()})[0]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_network_is_exported_by_its_own_forward(runtime: str, tmp_path: Path) -> None:
    module = network()
    graph, found = exported(module, image(), runtime, tmp_path)
    assert not graph.exact
    with torch.no_grad():
        assert relative_error(found, module(image()).numpy()) < 1e-5
    assert all("forward" not in vars(part) for part in module.modules())


def calibrated(grid: Grid, x: Tensor, axis: int | None = None) -> FixedQuantizer:
    quantizer = FixedQuantizer(grid, channel_axis=axis)
    with quantizer_mode(quantizer, Mode.OBSERVE):
        quantizer(x)
    return quantizer


def quantized(layer: Any, x: Tensor, grid: Grid) -> Any:
    form = QuantizedConv2d if isinstance(layer, nn.Conv2d) else QuantizedLinear
    made = form(copy.deepcopy(layer), calibrated(grid, layer.weight, 0), calibrated(grid, x))
    put_weights_on_grid(made)
    return made.requires_grad_(False)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_only_what_is_taken_of_a_product_is_computed(runtime: str, tmp_path: Path) -> None:
    """Query, key and value are products of their own, wherever they lie; codes are moved."""
    torch.manual_seed(0)
    x = torch.randn(3, 5, DIM)

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = PortableLayerNorm(nn.LayerNorm(DIM))
            self.act = PortableGELU()
            self.qkv = quantized(nn.Linear(DIM, 3 * DIM), x, Grid(8))

        def forward(self, x: Tensor) -> Tensor:
            y = self.qkv(F.pad(self.act(self.norm(x)), (0, 0, 0, 3)))
            first = y.reshape(3, 8, HEADS, 3, DIM // HEADS).permute(3, 0, 2, 1, 4).unbind(0)
            second = y.view(3, 8, HEADS, -1).split([4, 12, 8], dim=3)
            return torch.cat([*first, *(part.transpose(1, 2) for part in second)], -1)

    module = Heads().requires_grad_(False)
    graph, found = exported(module, x, runtime, tmp_path)
    assert graph.exact
    with torch.no_grad():
        np.testing.assert_array_equal(found, module(x).numpy())
    kinds = [node.op_type for node in graph._nodes]
    assert kinds.count("MatMul") == 6
    assert "Slice" not in kinds
    # The codes of 0 are added to codes.
    assert kinds.index("Pad") > kinds.index("QuantizeLinear")


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_linear_layer_keeps_the_axes_of_its_input(runtime: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, DIM)
    module = nn.Sequential(quantized(nn.Linear(DIM, 5), x, Grid(8)))
    _, found = exported(module, x, runtime, tmp_path)
    with torch.no_grad():
        np.testing.assert_array_equal(found, module(x).numpy())


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "depthwise": {"groups": 16, "padding": 1},
    "depthwise, stride 2": {"groups": 16, "padding": 1, "stride": 2},
    "groups": {"groups": 4, "stride": (1, 2), "dilation": 2},
    "depthwise with a multiplier": {"groups": 16, "out_channels": 32},
}


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_convolutions_with_groups_are_those_of_whole_numbers(
    kind: str, runtime: str, symmetric: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 16, 9, 11) + 0.5
    options = {"in_channels": 16, "out_channels": 16, "kernel_size": 3, **CONVOLUTIONS[kind]}
    source = nn.Conv2d(**options)
    layer = quantized(source, x, Grid(8, symmetric))
    graph = Graph("layer", dialect(runtime))
    y = convolution(graph, layer, given(graph, x))
    assert y.exact
    graph.output("y", y.name, np.float32, y.shape)
    found = run_graph(graph, runtime, tmp_path, {"x": x.numpy()})[0]
    geometry: Any = (source.stride, source.padding, source.dilation, source.groups)
    steps = (layer.input_quantizer.steps(x), layer.weight_quantizer.steps(layer.weight))
    sums = F.conv2d(steps[0].double(), steps[1].double(), None, *geometry).float()
    worth = layer.input_quantizer.step * layer.weight_quantizer.step
    scaled = sums * worth.reshape(-1, 1, 1)
    np.testing.assert_array_equal(found, (scaled + layer.bias[:, None, None]).numpy())
    with torch.no_grad():
        np.testing.assert_array_equal(found, layer(x).numpy())


class Biased(nn.Module):
    """An attention with a logit for each head, query and key."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core, self.table = core, nn.Parameter(torch.randn(HEADS, 9, 9))

    def forward(self, x: Tensor) -> Tensor:
        attended: Tensor = self.core(*x.chunk(3, dim=-1), TableBias(self.table * 2))
        return attended


@pytest.mark.parametrize("cut", [{}, {"group_bytes": 1}, {"whole_bytes": 0, "piece_bytes": 200}])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_attention_with_a_table_of_logits(
    runtime: str, cut: dict[str, int], tmp_path: Path
) -> None:
    """Whole, window by window, and by heads and some queries."""
    torch.manual_seed(0)
    x = torch.randn(4, HEADS, 9, 24)
    query, key, value = x.chunk(3, dim=-1)
    given_to = {"query": query, "key": key, "value": value, "softmax": torch.rand(500)}
    core = QuantizedSoftmaxAttention.of(
        SoftmaxAttention(0.3), lambda slot: calibrated(Grid(8), given_to[slot])
    )
    for module, exact in ((Biased(core), True), (Biased(SoftmaxAttention(0.3)), False)):
        module.requires_grad_(False)
        graph = Graph("network", replace(dialect(runtime), **cut))  # type: ignore[arg-type]
        with lowered(graph, module, "network"):
            y = module(given(graph, x))
        assert (graph.exact, y.exact) == (exact, exact)
        graph.output("y", y.name, np.float32, y.shape)
        (found,) = run_graph(graph, runtime, tmp_path, {"x": x.numpy()})
        with torch.no_grad():
            expected = module(x).numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=0 if exact else 1e-5)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_codes_of_products_are_those_of_products_and_quotients(
    runtime: str, tmp_path: Path
) -> None:
    """Of a million numbers some lie so near the middle of two codes that the order counts."""
    torch.manual_seed(0)
    x = torch.randn(1, 4096, 64)
    first = quantized(nn.Linear(64, 256, bias=False), x, Grid(8))
    with torch.no_grad():
        hidden = first(x)
    module = nn.Sequential(first, quantized(nn.Linear(256, 8), hidden, Grid(8)))
    graph, found = exported(module, x, runtime, tmp_path)
    assert graph.exact
    with torch.no_grad():
        np.testing.assert_array_equal(found, module(x).numpy())


def test_groups_whose_sums_would_be_rounded_are_refused() -> None:
    x = torch.ones(1, 1200, 3, 3)
    layer = quantized(nn.Conv2d(1200, 2, 3, groups=2), x, Grid(8))
    layer.weight.copy_(layer.weight_quantizer(torch.ones_like(layer.weight)))
    graph = Graph("stage.conv", openvino.DIALECT)
    with pytest.raises(DeployError, match=r"^stage\.conv has 2 groups of 600 channels"):
        convolution(graph, layer, given(graph, x))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_exact_is_what_was_lowered_exactly(runtime: str) -> None:
    """A float operator before a quantizer makes its codes and all behind it doubtful."""
    x = torch.randn(2, 5, DIM)
    layers = [quantized(nn.Linear(DIM, DIM), x, Grid(8)) for _ in range(2)]
    for between, doubtful in (
        (nn.Identity(), []),
        (nn.ReLU(), []),
        (PortableGELU(), []),
        (nn.GELU(), ["network.2.input"]),
        (nn.LayerNorm(DIM), ["network.2.input"]),
        (nn.Linear(DIM, DIM), ["network.2.input"]),
    ):
        module = nn.Sequential(layers[0], between, layers[1])
        graph = Graph("network", dialect(runtime))
        with lowered(graph, module, "network"):
            y = module(given(graph, x))
        assert graph.inexact == doubtful
        assert (graph.exact, y.exact) == (not doubtful, not doubtful)
    graph = Graph("network", openvino.FAST)
    with lowered(graph, layers[0], "network"):
        layers[0](given(graph, x))
    assert graph.inexact == ["network.input"]


def test_what_is_unknown_is_an_error_with_its_path() -> None:
    class Odd(nn.Module):
        def __init__(self, call: Any) -> None:
            super().__init__()
            self.call = call

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.call(x)
            return found

    x = torch.randn(2, 5, DIM)
    for call, told in (
        (lambda x: torch.fft.fft(x), "fft_fft"),
        (lambda x: x.cumsum(1), "cumsum"),
        (lambda x: x.mT, "asks for torch's mT"),
        (lambda x: x.view(torch.int32), "int32"),
        (lambda x: F.max_pool1d(x, 2), "max_pool1d"),
        (lambda x: x[x > 0], "gt"),
        (lambda x: x[torch.tensor([0, 1])], "a tensor"),
        (lambda x: F.pad(x, (1, 1), value=1.0), "zeros"),
        (lambda x: torch.add(x, x, alpha=2), "multiples"),
        (lambda x: F.softplus(x), "softplus"),
    ):
        graph = Graph("network", openvino.DIALECT)
        module = nn.Sequential(nn.Identity(), Odd(call))
        refused = pytest.raises(DeployError, match=rf"^stage\.1 .*{told}.*cannot be exported")
        with refused, lowered(graph, module, "stage"):
            module(given(graph, x))
        assert graph.path == "network"
