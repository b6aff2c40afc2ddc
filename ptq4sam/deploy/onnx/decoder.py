"""SAM's prompt encoder and mask decoder as one ONNX graph: prompts to masks."""

from __future__ import annotations

import math
from typing import cast

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ptq4sam.deploy.onnx.attention import attend, operands
from ptq4sam.deploy.onnx.graph import Dimension, Graph
from ptq4sam.deploy.onnx.layers import (
    apply_linear,
    array,
    layer_norm,
    linear,
    mlp_block,
    perceptron,
    quantize_input,
    sequential,
)
from ptq4sam.deploy.onnx.prompts import dense_prompts, sparse_prompts
from ptq4sam.quantization.portable import MOST_TERMS
from ptq4sam.sam.mask_decoder import MLP, MaskDecoder
from ptq4sam.sam.model import Sam
from ptq4sam.sam.transformer import Attention, TwoWayAttentionBlock

_PATH = "mask_decoder"
_TRANSFORMER = f"{_PATH}.transformer"


def decoder_graph(sam: Sam, signed: bool = False, exact: bool = True) -> Graph:
    """The prompt encoder and the mask decoder, float or quantized, for prompts on one picture.

    Inputs, float32 unless said otherwise, in pixels of the encoder's (resized) input:

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

    `signed` and `exact` are as for `Graph`.

    Raises:
        DeployError: a part has no exact form.
    """
    graph = Graph("mask_decoder", signed, exact)
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

    sparse = sparse_prompts(graph, encoder, places, labels, boxes)
    dense = dense_prompts(graph, encoder, mask, has_mask)
    source = graph.node("Add", [embedding, dense], f"{_PATH}.source")
    positions = array(encoder.dense_positions())
    tokens, image = _attend(graph, decoder, source, positions, sparse)
    logits, ious = _heads(graph, decoder, tokens, image, (rows, columns))
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


def _attend(
    graph: Graph, decoder: MaskDecoder, source: str, positions: NDArray[np.float32], sparse: str
) -> tuple[str, str]:
    """The transformer: tokens [prompts, n, dim] and image [prompts, cells, dim]."""
    transformer = decoder.transformer
    dim = decoder.iou_token.embedding_dim
    own = np.concatenate([array(decoder.iou_token.weight), array(decoder.mask_tokens.weight)])
    output_tokens = graph.constant(f"{_PATH}.output_tokens", own[None])
    shape = graph.node("Shape", [sparse], f"{_PATH}.sparse.shape")
    count = graph.slice(shape, 0, 1, 0, f"{_PATH}.prompts")
    each = graph.node("Concat", [count, graph.integers(1, 1)], f"{_PATH}.each", axis=0)
    output_tokens = graph.node("Expand", [output_tokens, each], f"{_PATH}.output_tokens.each")
    queries = graph.node("Concat", [output_tokens, sparse], f"{_PATH}.tokens", axis=1)
    cells = np.ascontiguousarray(positions.reshape(1, dim, -1).transpose(0, 2, 1))
    keys = graph.reshape(source, (0, dim, cells.shape[1]), f"{_PATH}.source.cells")
    keys = graph.transpose(keys, (0, 2, 1), f"{_PATH}.source.by_cell")
    keys = graph.node("Expand", [keys, each], f"{_PATH}.source.each")
    key_pe = graph.constant(f"{_PATH}.image_pe", cells)
    query_pe = queries
    for index, layer in enumerate(transformer.layers):
        queries, keys = _two_way(
            graph,
            cast(TwoWayAttentionBlock, layer),
            (queries, keys, query_pe, key_pe),
            f"{_TRANSFORMER}.layers.{index}",
        )
    path = f"{_TRANSFORMER}.final_attn_token_to_image"
    attended = _attention(
        graph,
        transformer.final_attn_token_to_image,
        graph.node("Add", [queries, query_pe], f"{path}.placed_tokens"),
        graph.node("Add", [keys, key_pe], f"{path}.placed_image"),
        keys,
        path,
    )
    queries = graph.node("Add", [queries, attended], f"{path}.added")
    norm = transformer.norm_final_attn
    return layer_norm(graph, norm, queries, f"{_TRANSFORMER}.norm_final_attn"), keys


def _two_way(
    graph: Graph, block: TwoWayAttentionBlock, state: tuple[str, str, str, str], path: str
) -> tuple[str, str]:
    """One block of the transformer: from the state of its stages to tokens and image."""
    queries, keys, query_pe, key_pe = state

    def added(first: str, second: str, name: str) -> str:
        return graph.node("Add", [first, second], f"{path}.{name}")

    if block.skip_first_layer_pe:
        inner = f"{path}.self_attn"
        queries = _attention(graph, block.self_attn, queries, queries, queries, inner)
    else:
        placed = added(queries, query_pe, "placed")
        attended = _attention(graph, block.self_attn, placed, placed, queries, f"{path}.self_attn")
        queries = added(queries, attended, "self_attended")
    queries = layer_norm(graph, block.norm1, queries, f"{path}.norm1")
    placed_tokens = added(queries, query_pe, "placed_tokens")
    placed_image = added(keys, key_pe, "placed_image")
    attended = _attention(
        graph,
        block.cross_attn_token_to_image,
        placed_tokens,
        placed_image,
        keys,
        f"{path}.cross_attn_token_to_image",
    )
    queries = layer_norm(
        graph, block.norm2, added(queries, attended, "token_to_image"), f"{path}.norm2"
    )
    changed = mlp_block(graph, block.mlp, queries, f"{path}.mlp")
    queries = layer_norm(graph, block.norm3, added(queries, changed, "changed"), f"{path}.norm3")
    attended = _attention(
        graph,
        block.cross_attn_image_to_token,
        placed_image,
        added(queries, query_pe, "placed_again"),
        queries,
        f"{path}.cross_attn_image_to_token",
    )
    keys = layer_norm(graph, block.norm4, added(keys, attended, "image_to_token"), f"{path}.norm4")
    return queries, keys


def _attention(graph: Graph, attention: Attention, q: str, k: str, v: str, path: str) -> str:
    projected = [
        linear(graph, cast(nn.Linear, getattr(attention, f"{role}_proj")), x, f"{path}.{role}_proj")
        for role, x in (("q", q), ("k", k), ("v", v))
    ]
    given = operands(graph, attention, projected, 0, path)
    attended = attend(graph, attention, given, path, MOST_TERMS)
    merged = quantize_input(graph, attention.out_proj, attended, f"{path}.out_proj")
    name = graph.transpose(merged.name, (0, 2, 1, 3), f"{path}.by_token")
    name = graph.reshape(name, (0, 0, attention.q_proj.out_features), f"{path}.merged")
    return apply_linear(graph, attention.out_proj, merged.renamed(name), f"{path}.out_proj")


def _heads(
    graph: Graph, decoder: MaskDecoder, tokens: str, image: str, grid: tuple[int, int]
) -> tuple[str, str]:
    """Logits [prompts, masks, height, width] and IoUs [prompts, masks] of all masks."""
    count = decoder.num_mask_tokens

    def token(place: int, name: str) -> str:
        index = graph.constant(f"{_PATH}.{name}.place", np.array(place, np.int64))
        return graph.node("Gather", [tokens, index], f"{_PATH}.{name}", axis=1)

    ious = perceptron(
        graph,
        decoder.iou_prediction_head,
        token(0, "iou_token"),
        f"{_PATH}.iou_prediction_head",
    )
    dim = decoder.iou_token.embedding_dim
    upscaled = graph.transpose(image, (0, 2, 1), f"{_PATH}.image")
    upscaled = graph.reshape(upscaled, (0, dim, *grid), f"{_PATH}.image.grid")
    upscaled = sequential(graph, decoder.output_upscaling, upscaled, f"{_PATH}.output_upscaling")
    upscaled = graph.reshape(upscaled, (0, dim // 8, 16 * math.prod(grid)), f"{_PATH}.upscaled")
    weights = []
    for index, mlp in enumerate(decoder.output_hypernetworks_mlps):
        path = f"{_PATH}.output_hypernetworks_mlps.{index}"
        weight = perceptron(graph, cast(MLP, mlp), token(1 + index, f"mask_token.{index}"), path)
        weights.append(graph.node("Unsqueeze", [weight, graph.integers(1)], f"{path}.weight"))
    together = graph.node("Concat", weights, f"{_PATH}.mask_weights", axis=1)
    logits = graph.node("MatMul", [together, upscaled], f"{_PATH}.logits")
    shape = (0, count, 4 * grid[0], 4 * grid[1])
    return graph.reshape(logits, shape, f"{_PATH}.all_masks"), ious


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
