"""Products of codes in float32, of an OpenVINO model whose products are int8.

Between the quantization of an exact export and its products lie whole numbers, in steps of 1. With
the quantization taken out OpenVINO multiplies the same numbers in float32, where the sums of an
exact export need no rounding (`quantization/whole.py`): the values are equal, whatever the kernel.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ptq4sam.errors import DeployError

_SCALE_INPUT = 1
_BOUNDS = slice(1, 5)
"""Inputs of a fake quantization behind the tensor: lowest and highest of what comes and leaves."""


def with_float_products(model: Any) -> Any:
    """Take quantization out of an OpenVINO model of an exact export; the model itself is changed.

    Raises:
        DeployError: a quantization is not of whole numbers: the model is no exact export.
    """
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind == "FakeQuantize":
            _replace(node, _whole_numbers(node))
        elif kind == "Multiply" and _is_one(node.input_value(_SCALE_INPUT).get_node()):
            # Else OpenVINO would hold the weights as int8, with a scale, in kernels of their own.
            _replace(node, node.input_value(0))
    model.validate_nodes_and_infer_types()
    return model


def _whole_numbers(node: Any) -> Any:
    """What a fake quantization of whole numbers gives, without it."""
    from openvino import opset13

    low, high, new_low, new_high = (
        float(port.get_node().get_data().item()) for port in node.input_values()[_BOUNDS]
    )
    if high - low != new_high - new_low or not low.is_integer():
        raise DeployError(
            f"{node.get_friendly_name()} quantizes with a scale of its own: only exact exports can "
            "be multiplied in float32"
        )
    whole = node.input_value(0)
    # Codes are whole numbers plus a zero point, which is subtracted again behind them.
    return whole if low == new_low else opset13.add(whole, np.float32(new_low - low)).output(0)


def _is_one(node: Any) -> bool:
    if node.get_type_name() == "Reshape":
        node = node.input_value(0).get_node()
    return node.get_type_name() == "Constant" and bool((node.get_data() == 1).all())


def _replace(node: Any, source: Any) -> None:
    for target in node.output(0).get_target_inputs():
        target.replace_source_output(source)
