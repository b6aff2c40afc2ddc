"""OpenVINO's format, from ONNX graphs."""

from __future__ import annotations

import re
from pathlib import Path

from ptq4sam.deploy.runtimes import require

_BETWEEN_TAGS = re.compile(r">\s+<")
_NAMES = re.compile(r' names="([^"]*)"')


def write_openvino(source: Path, target: Path, *, quantized: bool) -> None:
    """Write an ONNX graph as OpenVINO's .xml and, beside it, .bin.

    Quantize and dequantize nodes become fake-quantize operations of 256 levels on our scales and
    zero points, which OpenVINO's low-precision passes turn into integer kernels.

    Args:
        source: the ONNX file.
        target: the .xml file.
        quantized: keep constants as small as they are in the graph, half-precision tensors and
            tables of positions too. Those of a float model are folded, which NNCF needs.

    Raises:
        DependencyError: OpenVINO is not installed.
    """
    openvino = require("openvino")
    if not quantized:
        openvino.save_model(openvino.convert_model(source), target, compress_to_fp16=False)
        return
    model = openvino.Core().read_model(source)
    asked = {name for port in (*model.inputs, *model.outputs) for name in port.get_names()}
    openvino.serialize(model, target)
    # Half of the description is indentation, and names of tensors that nobody asks for.
    text = _BETWEEN_TAGS.sub("><", target.read_text(encoding="utf-8"))
    text = _NAMES.sub(lambda found: found[0] if asked & set(found[1].split(",")) else "", text)
    target.write_text(text, encoding="utf-8")
