"""Accumulations against onnxruntime's integer operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ptq4sam.deploy.integer.layers import IntegerConv2d, IntegerLinear
from ptq4sam.model.layers import QuantizedConv2d, QuantizedLinear
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
    x, source = torch.randn(200, 768), nn.Linear(768, 96).requires_grad_(False)
    layer = QuantizedLinear(source, calibrated(source.weight, 0), calibrated(x))
    layer.weight.copy_(layer.weight_quantizer(layer.weight))
    integer = IntegerLinear(layer, "linear")
    codes = integer.quantize(x)
    expected = run_node(
        "MatMulInteger",
        {
            "a": codes.numpy().astype(np.uint8),
            "b": integer.weight_codes.t().numpy().astype(np.uint8),
            "za": np.array(integer.input_grid.zero_point, np.uint8),
            "zb": integer.weight_zero_point.numpy().astype(np.uint8),
        },
    )
    assert np.array_equal(integer.accumulate(codes).numpy(), expected)


@pytest.mark.parametrize(
    ("kernel", "options"),
    [(1, {}), (3, {"padding": 1}), (3, {"padding": (2, 0), "stride": (1, 2), "dilation": 2})],
)
def test_convolution_equals_convinteger(kernel: int, options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    source = nn.Conv2d(32, 24, kernel, bias=False, **options).requires_grad_(False)
    x = torch.randn(2, 32, 15, 17) + 0.5
    # One scale and zero point for all channels: onnxruntime has no other in this operator.
    layer = QuantizedConv2d(source, calibrated(source.weight), calibrated(x))
    layer.weight.copy_(layer.weight_quantizer(layer.weight))
    integer = IntegerConv2d(layer, "convolution")
    codes = integer.quantize(x)
    expected = run_node(
        "ConvInteger",
        {
            "x": codes.numpy().astype(np.uint8),
            "w": integer.weight_codes.numpy().astype(np.uint8),
            "zx": np.array(integer.input_grid.zero_point, np.uint8),
            "zw": np.array(int(integer.weight_zero_point[0]), np.uint8),
        },
        pads=[source.padding[0], source.padding[1]] * 2,
        strides=list(source.stride),
        dilations=list(source.dilation),
    )
    assert np.array_equal(integer.accumulate(codes).numpy(), expected)
