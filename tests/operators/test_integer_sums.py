"""Accumulations against onnxruntime's integer operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ptq4sam.operators.arithmetic import Arithmetic, compute
from ptq4sam.operators.base import step_of_sums
from ptq4sam.operators.convolution import QuantizedConv2d
from ptq4sam.operators.linear import QuantizedLinear
from ptq4sam.quantization import whole
from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.quantizers import FixedQuantizer, Mode

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

Run = Callable[..., np.ndarray[Any, Any]]


def run_node(operator: str, inputs: dict[str, np.ndarray[Any, Any]], **attributes: Any) -> Any:
    """One node of ONNX on these inputs, whose output is int32."""
    helper, kinds = onnx.helper, onnx.TensorProto
    types = {np.dtype("uint8"): kinds.UINT8, np.dtype("int8"): kinds.INT8}
    node = helper.make_node(operator, list(inputs), ["y"], **attributes)
    graph = helper.make_graph(
        [node],
        "one",
        [
            helper.make_tensor_value_info(name, types[value.dtype], value.shape)
            for name, value in inputs.items()
        ],
        [helper.make_tensor_value_info("y", kinds.INT32, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, inputs)[0]


def calibrated(x: torch.Tensor, channel_axis: int | None = None) -> FixedQuantizer:
    quantizer = FixedQuantizer(Grid(8), channel_axis=channel_axis)
    quantizer.mode = Mode.OBSERVE
    quantizer(x)
    quantizer.mode = Mode.QUANTIZE
    return quantizer


def test_linear_equals_matmulinteger() -> None:
    torch.manual_seed(0)
    x, source = torch.randn(200, 768), nn.Linear(768, 96, bias=False).requires_grad_(False)
    layer = QuantizedLinear(source, calibrated(source.weight, 0), calibrated(x))
    layer.weight.copy_(layer.weight_quantizer(layer.weight))
    weight = layer.weight_quantizer
    sums = run_node(
        "MatMulInteger",
        {
            "a": layer.input_quantizer.codes(x).numpy().astype(np.uint8),
            "b": weight.codes(layer.weight).t().numpy().astype(np.uint8),
            "za": layer.input_quantizer.zero_point.numpy().astype(np.uint8),
            "zb": weight.zero_point.numpy().astype(np.uint8),
        },
    )
    expected = sums.astype(np.float32) * step_of_sums(layer).numpy()
    for arithmetic in (Arithmetic.WHOLE, Arithmetic.INTEGER):
        compute(layer, arithmetic)
        assert np.array_equal(layer(x).numpy(), expected), arithmetic


@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        (1, {}),
        (3, {"padding": 1}),
        (3, {"padding": (2, 0), "stride": (1, 2), "dilation": 2}),
        (3, {"padding": 1, "stride": 2, "groups": 32}),
        (1, {"groups": 4}),
    ],
)
@pytest.mark.parametrize("direct", [True, False])
def test_convolution_equals_convinteger(
    kernel: int, options: dict[str, Any], direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Directly as on a CPU, and by windows as on a GPU."""
    monkeypatch.setattr(whole, "_has_direct_convolutions", lambda _device: direct)
    torch.manual_seed(1)
    source = nn.Conv2d(32, 64, kernel, bias=False, **options).requires_grad_(False)
    x = torch.randn(2, 32, 15, 17) + 0.5
    # One scale and zero point for all channels: onnxruntime has no other in this operator.
    layer = QuantizedConv2d(source, calibrated(source.weight), calibrated(x))
    layer.weight.copy_(layer.weight_quantizer(layer.weight))
    sums = run_node(
        "ConvInteger",
        {
            "x": layer.input_quantizer.codes(x).numpy().astype(np.uint8),
            "w": layer.weight_quantizer.codes(layer.weight).numpy().astype(np.uint8),
            "zx": layer.input_quantizer.zero_point.numpy().astype(np.uint8),
            "zw": layer.weight_quantizer.zero_point.numpy().astype(np.uint8),
        },
        pads=[source.padding[0], source.padding[1]] * 2,
        strides=list(source.stride),
        dilations=list(source.dilation),
        group=source.groups,
    )
    expected = sums.astype(np.float32) * step_of_sums(layer).numpy()
    for arithmetic in (Arithmetic.WHOLE, Arithmetic.INTEGER):
        compute(layer, arithmetic)
        assert np.array_equal(layer(x).numpy(), expected), arithmetic
