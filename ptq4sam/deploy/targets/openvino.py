"""OpenVINO on the CPU, and its format, from ONNX graphs."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ptq4sam.deploy.targets.dialect import Dialect
from ptq4sam.deploy.targets.target import (
    Arrays,
    Precision,
    Products,
    Target,
    require,
    unreadable,
)
from ptq4sam.errors import DeployError

_log = logging.getLogger(__name__)

# Signed codes, which it multiplies with each other. It has its own order of scales, so products are
# of whole steps. A Gather is fast; it joins the chain of a softmax's operations, and the long ones
# of a portable softmax take a second to compile for some thousand nodes.
DIALECT = Dialect(
    codes="signed",
    products="steps",
    dequantizes="quantizers",
    between="portable",
    convolutions="dequantized",
    lookup="Gather",
    whole_bytes=64 * 2**20,
    group_bytes=None,
    piece_bytes=32 * 2**20,
)
FAST = replace(DIALECT, products="worths", between="own", piece_bytes=16 * 2**20)

_BETWEEN_TAGS = re.compile(r">\s+<")
_NAMES = re.compile(r' names="([^"]*)"')
_SCALE_INPUT = 1
_BOUNDS = slice(1, 5)
"""Inputs of a fake quantization behind the tensor: lowest and highest of what comes and leaves."""


class OpenVinoSession:
    """A graph in OpenVINO on the CPU."""

    def __init__(
        self,
        path: Path,
        outputs: Sequence[str],
        precision: Precision = "f32",
        products: Products | None = None,
    ) -> None:
        openvino = require("openvino")
        core = openvino.Core()
        try:
            model = core.read_model(path)
        except RuntimeError as error:
            raise unreadable(path, "OpenVINO", error) from error
        for result in model.results:
            if not result.input_value(0).names & set(outputs):
                model.remove_result(result)
        if products == "float32":
            model = with_float_products(model)
        # OpenVINO's own choice of precision depends on the processor: it must be said.
        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        if products is not None:
            # Activations that the runtime quantizes for itself have other codes.
            settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
        self._compiled = compile_for_cpu(core, model, settings)
        self._request = self._compiled.create_infer_request()
        self._outputs = list(outputs)

    def run(self, inputs: Arrays, seconds: float | None = None) -> list[NDArray[np.float32]]:
        """Outputs that the session was opened for, in that order; see `Session`."""
        known = {name: value for name, value in inputs.items() if name in self._names}
        if seconds is not None:
            self._wait(known, seconds)
            found = self._request.results
        else:
            found = self._request.infer(known, share_inputs=True)
        return [np.array(found[name]) for name in self._outputs]

    def _wait(self, inputs: Arrays, seconds: float) -> None:
        """Compute within a time; errors as `Session.run`."""
        ends = time.monotonic() + seconds
        self._request.start_async(inputs, share_inputs=True)
        done = self._request.wait_for(round(1000 * seconds))
        if not done:
            self._request.cancel()
            # Its way of saying that it was ended; one that has just come to its end says nothing.
            with contextlib.suppress(RuntimeError):
                self._request.wait()
        if not done or time.monotonic() > ends:
            raise TimeoutError

    @property
    def _names(self) -> set[str]:
        return {name for port in self._compiled.inputs for name in port.names}


def compile_for_cpu(core: Any, model: Any, settings: Mapping[str, object]) -> Any:
    """Compile a model for the CPU.

    OpenVINO joins chains of elementwise operations, and gives up where a chain needs more registers
    than the processor has (16 with AVX2): then it runs them one by one.
    """
    try:
        return core.compile_model(model, "CPU", settings)
    except RuntimeError as error:
        if "not enough registers" not in str(error):
            raise
        _log.info("OpenVINO joins no operations here: the processor has too few registers for some")
        return core.compile_model(model, "CPU", {**settings, "SNIPPETS_MODE": "DISABLE"})


def write_openvino(source: Path, quantized: bool, products: Products | None = None) -> None:
    """Write an ONNX graph as OpenVINO's .xml and .bin, beside it.

    Quantize and dequantize nodes become fake-quantize operations of 256 levels on our scales and
    zero points, which OpenVINO's low-precision passes turn into integer kernels.

    Args:
        source: the ONNX file.
        quantized: keep constants as small as they are in the graph, half-precision tensors and
            tables of positions too. Those of a float model are folded, which NNCF needs.
        products: "float32" leaves out the quantization that OpenVINO makes int8 products of.

    Raises:
        DependencyError: OpenVINO is not installed.
    """
    openvino, target = require("openvino"), source.with_suffix(".xml")
    size = source.stat().st_size
    if not quantized:
        with refused_writing(target, size):
            openvino.save_model(openvino.convert_model(source), target, compress_to_fp16=False)
        return
    model = openvino.Core().read_model(source)
    if products == "float32":
        model = with_float_products(model)
    asked = {name for port in (*model.inputs, *model.outputs) for name in port.get_names()}
    with refused_writing(target, size):
        openvino.serialize(model, target)
    # Half of the description is indentation, and names of tensors that nobody asks for.
    text = _BETWEEN_TAGS.sub("><", target.read_text(encoding="utf-8"))
    text = _NAMES.sub(lambda found: found[0] if asked & set(found[1].split(",")) else "", text)
    target.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def refused_writing(target: Path, size: int) -> Iterator[None]:
    """Find out why OpenVINO cannot write a file: all it says is that it cannot.

    Args:
        target: the file.
        size: bytes that it has, or nearly.

    Raises:
        OSError: the system's reason.
    """
    try:
        yield
    except RuntimeError as error:
        if "iostream error" not in str(error):
            raise
        with target.open("wb") as file:
            file.write(bytes(size))
        raise


def with_float_products(model: Any) -> Any:
    """Take quantization out of an OpenVINO model of an exact export; the model itself is changed.

    Between the quantization and its products lie whole numbers, in steps of 1. Without it OpenVINO
    multiplies the same numbers in float32, where the sums of an exact export need no rounding
    (`quantization/whole.py`): the values are equal, whatever the kernel.

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


TARGET = Target(
    name="openvino",
    form="openvino",
    suffixes=(".xml", ".bin"),
    dialect=DIALECT,
    fast=FAST,
    products=("int8", "float32"),
    held=("float32",),
    precisions=("f32", "bf16"),
    open=OpenVinoSession,
    convert=write_openvino,
)
