"""SAM's prompt encoder and mask decoder as one ONNX graph: prompts to masks."""

from __future__ import annotations

from typing import Any

import numpy as np

from ptq4sam.deploy.onnx.graph import Dimension, Graph
from ptq4sam.deploy.onnx.lowering import lowered
from ptq4sam.deploy.onnx.prompts import dense_prompts, sparse_prompts
from ptq4sam.deploy.onnx.traced import Traced
from ptq4sam.deploy.targets.dialect import Dialect
from ptq4sam.sam.model import Sam
from ptq4sam.sam.stages import run_stages

_PATH = "mask_decoder"


def decoder_graph(sam: Sam, dialect: Dialect) -> Graph:
    """The prompt encoder and the mask decoder, float or quantized, for prompts on one picture.

    Inputs, float32 unless said otherwise, in pixels of the square of prompts:

    - `embedding` [1, channels, rows, columns], the encoder's output.
    - `points` [prompts, n, 2] (x, y) and `labels` [prompts, n] int64: 1 object, 0 background, -1
      padding. n may be 0; points without a box need one more of label -1, as SAM was trained.
    - `boxes` [prompts, 0 or 1, 4] xyxy.
    - `mask` [prompts or 1, 1, height, width], logits of an earlier prediction, used where
      `has_mask` [1] is not 0.
    - `multimask` [1] int64: 1 for three masks a prompt, 0 for one.
    - `original_size` [2] int64: height and width of the picture before it was resized.

    Outputs, M being 3 or 1:

    - `low_res` [prompts, M, height, width], logits of the padded input at a quarter of its size.
    - `iou` [prompts, M], the model's estimate of each mask's IoU.
    - `masks` [prompts, M, *original_size], logits of the picture; a pixel above 0 is in the mask.

    Raises:
        DeployError: a part has no exact form.
    """
    graph = Graph("mask_decoder", dialect)
    encoder, decoder = sam.prompt_encoder, sam.mask_decoder
    rows, columns = encoder.image_embedding_size
    height, width = encoder.mask_input_size
    count, points = Dimension("prompts"), Dimension("points")
    embedding = graph.input("embedding", np.float32, [1, encoder.embed_dim, rows, columns])
    places = graph.input("points", np.float32, [count, points, 2])
    labels = graph.input("labels", np.int64, [count, points])
    boxes = graph.input("boxes", np.float32, [count, Dimension("boxes"), 4])
    mask = graph.input("mask", np.float32, [Dimension("given_masks"), 1, height, width])
    has_mask = graph.input("has_mask", np.float32, [1])
    multimask = graph.input("multimask", np.int64, [1])
    original_size = graph.input("original_size", np.int64, [2])

    image = Traced(graph, embedding, (1, encoder.embed_dim, rows, columns))
    sparse = sparse_prompts(graph, encoder, places, labels, boxes)
    dense = dense_prompts(graph, encoder, mask, has_mask)
    with lowered(graph, decoder, _PATH):
        traced: Any = (image, encoder.dense_positions(), sparse, dense)
        tokens, keys, *positions = decoder.begin(*traced)
        state: Any = (tokens, _for_each(keys, sparse), *positions)
        tokens, keys, *_ = run_stages(decoder.transformer.stages(), state)
        found: Any = decoder.heads(tokens, keys, (rows, columns))
        logits, ious = (x.name for x in found)
    # Mask 0 alone, or masks 1 to 3.
    last = graph.node("Mul", [multimask, graph.integers(3)], f"{_PATH}.last_of_many")
    last = graph.node("Add", [last, graph.integers(1)], f"{_PATH}.end")
    chosen = [multimask, last, graph.integers(1)]
    low_res = graph.node("Slice", [logits, *chosen], f"{_PATH}.chosen")
    quality = graph.node("Slice", [ious, *chosen], f"{_PATH}.chosen_ious")
    masks = _resize(graph, low_res, original_size, sam.geometry.prompt_side)
    each = Dimension("masks")
    graph.output("low_res", low_res, np.float32, [count, each, height, width])
    graph.output("iou", quality, np.float32, [count, each])
    shape = [count, each, Dimension("height"), Dimension("width")]
    graph.output("masks", masks, np.float32, shape)
    return graph


def _for_each(x: Any, prompts: Traced) -> Traced:
    """Copies of the image's cells [1, cells, dim], one a prompt.

    Here, where there is the least to copy; runtimes spread one to many themselves, but not to none.
    """
    graph = prompts.graph
    shape = graph.node("Shape", [prompts.name], f"{_PATH}.sparse.shape")
    count = graph.slice(shape, 0, 1, 0, f"{_PATH}.prompts")
    each = graph.node("Concat", [count, graph.integers(1, 1)], f"{_PATH}.each", axis=0)
    name = graph.node("Expand", [x.name, each], f"{_PATH}.image.each")
    return Traced(graph, name, (prompts.shape[0], *x.shape[1:]), exact=x.exact)


def _resize(graph: Graph, low_res: str, original_size: str, side: int) -> str:
    """Logits of the padded input to those of the picture."""
    path = "postprocess"
    shape = graph.node("Shape", [low_res], f"{path}.shape")
    counts = graph.slice(shape, 0, 2, 0, f"{path}.counts")
    square = graph.node("Concat", [counts, graph.integers(side, side)], f"{path}.square", axis=0)
    large = _interpolate(graph, low_res, square, f"{path}.input")
    # Size of the resized picture, round(length * side / longest), halves up, in integers.
    longest = graph.node("ReduceMax", [original_size], f"{path}.longest", keepdims=1)
    doubled = graph.node("Mul", [original_size, graph.integers(2 * side)], f"{path}.doubled")
    numerator = graph.node("Add", [doubled, longest], f"{path}.numerator")
    denominator = graph.node("Mul", [longest, graph.integers(2)], f"{path}.denominator")
    input_size = graph.node("Div", [numerator, denominator], f"{path}.quotient")
    input_size = graph.node("Max", [input_size, graph.integers(1)], f"{path}.input_size")
    inside = [large, graph.integers(0, 0), input_size, graph.integers(2, 3)]
    cut = graph.node("Slice", inside, f"{path}.cut")
    wanted = graph.node("Concat", [counts, original_size], f"{path}.size", axis=0)
    return _interpolate(graph, cut, wanted, path)


def _interpolate(graph: Graph, x: str, size: str, path: str) -> str:
    return graph.node(
        "Resize",
        [x, "", "", size],
        path,
        mode="linear",
        coordinate_transformation_mode="half_pixel",
    )
