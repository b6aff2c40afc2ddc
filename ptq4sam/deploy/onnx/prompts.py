"""SAM's prompt encoder as ONNX nodes."""

from __future__ import annotations

import math

import numpy as np
import torch

from ptq4sam.deploy.onnx.graph import Graph
from ptq4sam.deploy.onnx.lowering import lowered
from ptq4sam.deploy.onnx.moves import UNKNOWN
from ptq4sam.deploy.onnx.traced import Traced
from ptq4sam.deploy.onnx.values import array
from ptq4sam.operators.base import is_portable
from ptq4sam.sam.prompt_encoder import PromptEncoder, waves

_PATH = "prompt_encoder"
_PROMPTS, _POINTS = UNKNOWN, 2 * UNKNOWN
"""Sizes that are known when the graph runs."""


def sparse_prompts(
    graph: Graph, encoder: PromptEncoder, points: str, labels: str, boxes: str
) -> Traced:
    """Embeddings [prompts, tokens, dim] of points, then of the corners of boxes.

    Args:
        graph: where nodes go.
        encoder: the prompt encoder.
        points: [prompts, n, 2] float32, n may be 0.
        labels: [prompts, n] int64 of 1, 0 and -1.
        boxes: [prompts, 0 or 1, 4] float32.
    """
    path = f"{_PATH}.points"
    encoded = _positions(graph, encoder, points, path)
    padding = graph.constant(f"{path}.none", np.array(-1, np.int64))
    is_padding = graph.node("Equal", [labels, padding], f"{path}.is_padding")
    is_padding = graph.node("Unsqueeze", [is_padding, graph.integers(-1)], f"{path}.nowhere")
    encoded = graph.node("Where", [is_padding, graph.number(0.0), encoded], f"{path}.placed")
    kinds = torch.cat(
        [encoder.not_a_point_embed.weight]
        + [encoder.get_parameter(f"point_embeddings.{kind}.weight") for kind in (0, 1)]
    )
    # Rows of the table are those of labels -1, 0 and 1.
    rows = graph.node("Sub", [labels, padding], f"{path}.rows")
    table = graph.constant(f"{path}.kinds", array(kinds))
    kind = graph.node("Gather", [table, rows], f"{path}.kind", axis=0)
    tokens = [graph.node("Add", [encoded, kind], path)]
    for corner, first in (("top_left", 0), ("bottom_right", 2)):
        path = f"{_PATH}.boxes.{corner}"
        place = graph.slice(boxes, first, first + 2, -1, path + ".place")
        encoded = _positions(graph, encoder, place, path)
        weight = encoder.get_parameter(f"point_embeddings.{2 + first // 2}.weight")
        kind = graph.constant(f"{path}.kind", array(weight))
        tokens.append(graph.node("Add", [encoded, kind], path))
    name = graph.node("Concat", tokens, f"{_PATH}.sparse", axis=1)
    exact = graph.portable and is_portable(encoder.pe_layer)
    return Traced(graph, name, (_PROMPTS, _POINTS, encoder.embed_dim), exact=exact)


def dense_prompts(graph: Graph, encoder: PromptEncoder, mask: str, has_mask: str) -> Traced:
    """Embedding of a mask [m, 1, height, width] where `has_mask` [1] is not 0, else of none.

    What a mask passes is float: prompts without one are exact.
    """
    path = f"{_PATH}.mask_downscaling"
    given = Traced(graph, mask, (_PROMPTS, 1, *encoder.mask_input_size))
    with lowered(graph, encoder.mask_downscaling, path):
        downscaled = encoder.mask_downscaling(given).name
    none = array(encoder.no_mask_embed.weight).reshape(1, -1, 1, 1)
    chosen = graph.node("Greater", [has_mask, graph.number(0.0)], f"{_PATH}.has_mask")
    without = graph.constant(f"{_PATH}.no_mask_embed", none)
    name = graph.node("Where", [chosen, downscaled, without], f"{_PATH}.dense")
    return Traced(graph, name, (_PROMPTS, encoder.embed_dim, *encoder.image_embedding_size))


def _positions(graph: Graph, encoder: PromptEncoder, points: str, path: str) -> str:
    """Fourier features of [prompts, n, 2] positions in pixels of the input."""
    height, width = encoder.input_image_size
    centred = graph.node("Add", [points, graph.number(0.5)], f"{path}.centred")
    size = graph.constant(f"{path}.size", np.array([width, height], np.float32))
    unit = graph.node("Div", [centred, size], f"{path}.unit")
    doubled = graph.node("Mul", [unit, graph.number(2.0)], f"{path}.doubled")
    signed = graph.node("Sub", [doubled, graph.number(1.0)], f"{path}.signed")
    matrix = array(encoder.pe_layer.positional_encoding_gaussian_matrix)
    if graph.portable and is_portable(encoder.pe_layer):
        place = Traced(graph, signed, (_PROMPTS, _POINTS, 2))
        turns = (
            Traced(graph, graph.constant(f"{path}.turns.{axis}", row), row.shape)
            for axis, row in zip("xy", matrix, strict=True)
        )
        names = [
            wave.name for wave in waves(place.narrow(-1, 0, 1), place.narrow(-1, 1, 1), *turns)
        ]
        return graph.node("Concat", names, f"{path}.encoded", axis=-1)
    product = graph.node(
        "MatMul", [signed, graph.constant(f"{path}.frequencies", matrix)], f"{path}.product"
    )
    angles = graph.node("Mul", [product, graph.number(2 * math.pi)], f"{path}.angles")
    names = [graph.node(name, [angles], f"{path}.{name.lower()}") for name in ("Sin", "Cos")]
    return graph.node("Concat", names, f"{path}.encoded", axis=-1)
