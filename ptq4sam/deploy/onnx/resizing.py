"""Bicubic resizing as ONNX nodes; a float one's own forward writes its own."""

from __future__ import annotations

from typing import cast

from torch import Tensor
from torch.nn import functional as F

from ptq4sam.deploy.onnx.graph import Graph
from ptq4sam.deploy.onnx.lowering import operator
from ptq4sam.deploy.onnx.traced import Traced
from ptq4sam.operators.resizing import PortableBicubicResize, resized


@operator(PortableBicubicResize)
def bicubic(graph: Graph, module: PortableBicubicResize, x: Traced) -> Traced:
    """Resize [batch, channels, rows, columns]."""
    given = cast(Tensor, x)
    if graph.portable:
        return cast(Traced, resized(given, module.size)).portable(x)
    return cast(Traced, F.interpolate(given, module.size, mode="bicubic", align_corners=False))
