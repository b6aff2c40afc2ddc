"""OpenVINO's format, from ONNX graphs."""

from __future__ import annotations

from pathlib import Path

from ptq4sam.deploy.runtimes import require


def write_openvino(source: Path, target: Path) -> None:
    """Write an ONNX graph as OpenVINO's .xml and, beside it, .bin.

    Quantize and dequantize nodes become fake-quantize operations of 256 levels on our scales and
    zero points, which OpenVINO's low-precision passes turn into integer kernels; constants stay
    what they are, integers or float32.

    Raises:
        DependencyError: OpenVINO is not installed.
    """
    openvino = require("openvino")
    openvino.save_model(openvino.convert_model(source), target, compress_to_fp16=False)
