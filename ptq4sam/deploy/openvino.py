"""OpenVINO's format, from ONNX graphs."""

from __future__ import annotations

import re
from pathlib import Path

from ptq4sam.deploy.runtimes import require

_BETWEEN_TAGS = re.compile(r">\s+<")


def write_openvino(source: Path, target: Path) -> None:
    """Write an ONNX graph as OpenVINO's .xml and, beside it, .bin.

    Quantize and dequantize nodes become fake-quantize operations of 256 levels on our scales and
    zero points, which OpenVINO's low-precision passes turn into integer kernels; constants stay
    what they are, integers or float32.

    Raises:
        DependencyError: OpenVINO is not installed.
    """
    openvino = require("openvino")
    # Not by convert_model, which would fold what the file holds small: half-precision tensors and
    # tables of positions.
    openvino.serialize(openvino.Core().read_model(source), target)
    # A quarter of the description is indentation.
    target.write_text(_BETWEEN_TAGS.sub("><", target.read_text(encoding="utf-8")), encoding="utf-8")
