"""An image encoder as an ONNX graph: `image` to `embedding`."""

from __future__ import annotations

from typing import Any

import numpy as np

from ptq4sam.deploy.onnx.graph import Graph
from ptq4sam.deploy.onnx.lowering import lowered
from ptq4sam.deploy.onnx.traced import Traced
from ptq4sam.deploy.targets.dialect import Dialect
from ptq4sam.errors import DeployError
from ptq4sam.sam.model import Sam

_PATH = "image_encoder"


def encoder_graph(sam: Sam, dialect: Dialect) -> Graph:
    """The image encoder, float or quantized, for one normalised and padded picture.

    Input `image` [1, 3, side, side], output `embedding` [1, channels, rows, columns], float32.

    Raises:
        DeployError: a part has no exact form.
    """
    graph, encoder = Graph("image_encoder", dialect), sam.image_encoder
    shape = [1, 3, sam.image_size, sam.image_size]
    image = Traced(graph, graph.input("image", np.float32, shape), shape)
    with lowered(graph, encoder, _PATH):
        found: Any = encoder(image)
    embedding, *others = found if isinstance(found, tuple) else (found,)
    if others:
        raise DeployError(f"{_PATH} hands over {1 + len(others)} features: one can be exported")
    graph.output("embedding", embedding.name, np.float32, embedding.shape)
    return graph
