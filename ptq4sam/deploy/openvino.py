"""OpenVINO's format, from ONNX graphs."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from ptq4sam.deploy.float_products import with_float_products
from ptq4sam.deploy.runtimes import Products, require

_BETWEEN_TAGS = re.compile(r">\s+<")
_NAMES = re.compile(r' names="([^"]*)"')


def write_openvino(
    source: Path, target: Path, *, quantized: bool, products: Products | None = None
) -> None:
    """Write an ONNX graph as OpenVINO's .xml and, beside it, .bin.

    Quantize and dequantize nodes become fake-quantize operations of 256 levels on our scales and
    zero points, which OpenVINO's low-precision passes turn into integer kernels.

    Args:
        source: the ONNX file.
        target: the .xml file.
        quantized: keep constants as small as they are in the graph, half-precision tensors and
            tables of positions too. Those of a float model are folded, which NNCF needs.
        products: "float32" leaves out the quantization that OpenVINO makes int8 products of.

    Raises:
        DependencyError: OpenVINO is not installed.
    """
    openvino = require("openvino")
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
