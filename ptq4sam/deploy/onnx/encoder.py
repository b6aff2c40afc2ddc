"""SAM's image encoder as an ONNX graph: `image` to `embedding`."""

from __future__ import annotations

from typing import cast

import numpy as np
from torch import Tensor, nn

from ptq4sam.deploy.onnx.attention import attend, operands
from ptq4sam.deploy.onnx.graph import Graph
from ptq4sam.deploy.onnx.layers import (
    apply_linear,
    array,
    convolution,
    layer_norm,
    mlp_block,
    quantize_input,
    sequential,
)
from ptq4sam.deploy.onnx.values import Value
from ptq4sam.sam.image_encoder import (
    Attention,
    Block,
    ImageEncoderViT,
    relative_rows,
    table_of_size,
)

_PATH = "image_encoder"


def encoder_graph(encoder: ImageEncoderViT) -> Graph:
    """The encoder, float or quantized, for one normalised and padded picture.

    Input `image` [1, 3, side, side], output `embedding` [1, channels, rows, columns], float32.

    Raises:
        DeployError: a part has no exact form.
    """
    graph = Graph("image_encoder")
    side = encoder.img_size
    patches = encoder.patch_embed.proj
    rows = side // patches.stride[0]
    image = graph.input("image", np.float32, [1, patches.in_channels, side, side])
    x = convolution(graph, patches, image, f"{_PATH}.patch_embed.proj")
    x = graph.transpose(x, (0, 2, 3, 1), f"{_PATH}.patch_embed")
    if encoder.pos_embed is not None:
        positions = graph.constant(f"{_PATH}.pos_embed", array(encoder.pos_embed))
        x = graph.node("Add", [x, positions], f"{_PATH}.placed")
    for index, block in enumerate(encoder.blocks):
        x = _block(graph, cast(Block, block), x, rows, f"{_PATH}.blocks.{index}")
    x = graph.transpose(x, (0, 3, 1, 2), f"{_PATH}.channels_first")
    x = sequential(graph, encoder.neck, x, f"{_PATH}.neck")
    channels = cast(nn.Conv2d, encoder.neck[0]).out_channels
    graph.output("embedding", x, np.float32, [1, channels, rows, rows])
    return graph


def _block(graph: Graph, block: Block, x: str, side: int, path: str) -> str:
    normalized = layer_norm(graph, block.norm1, x, f"{path}.norm1")
    attended = _attention(graph, block.attn, normalized, side, block.window_size, f"{path}.attn")
    x = graph.node("Add", [x, attended], f"{path}.attended")
    normalized = layer_norm(graph, block.norm2, x, f"{path}.norm2")
    changed = mlp_block(graph, block.mlp, normalized, f"{path}.mlp")
    return graph.node("Add", [x, changed], path)


def _attention(
    graph: Graph, attention: Attention, x: str, side: int, window: int, path: str
) -> str:
    """Attention within windows (or, with window 0, in the whole grid) of [1, side, side, dim]."""
    # Windows are cut from the codes, which are a quarter of the float tensor. What is added at the
    # edge is the code of 0.
    codes = quantize_input(graph, attention.qkv, x, f"{path}.qkv")
    size = window or side
    if window:
        codes = _partition(graph, codes, side, window, attention.qkv.in_features, path)
    qkv = apply_linear(graph, attention.qkv, codes, f"{path}.qkv")
    dim = attention.proj.in_features
    parts = graph.split(qkv, 3, -1, f"{path}.parts")
    given = operands(graph, attention, parts, size * size, path)

    def bias(logits: str, query: str) -> str:
        return _add_positions(graph, attention, logits, query, size, path)

    positions = bias if attention.use_rel_pos else None
    attended = attend(graph, attention, given, path, positions)
    merged = quantize_input(graph, attention.proj, attended, f"{path}.proj")
    name = graph.transpose(merged.name, (0, 2, 1, 3), f"{path}.by_token")
    name = graph.reshape(name, (-1, size, size, dim), f"{path}.merged")
    if window:
        # The edge is cut off before the projection, which then has less to do.
        name = _unpartition(graph, name, side, window, dim, path)
    return apply_linear(graph, attention.proj, merged.renamed(name), f"{path}.proj")


def _partition(graph: Graph, x: Value, side: int, window: int, dim: int, path: str) -> Value:
    """[1, side, side, dim] to [windows, window, window, dim], padded with zeros."""
    name, margin = x.name, -side % window
    if margin:
        zero = np.float32(0) if x.affine is None else x.affine.zero_point
        pads = graph.integers(0, 0, 0, 0, 0, margin, margin, 0)
        fill = graph.constant(f"{path}.padding", np.array(zero))
        name = graph.node("Pad", [name, pads, fill], f"{path}.padded")
    count = (side + margin) // window
    name = graph.reshape(name, (count, window, count, window, dim), f"{path}.windows.cut")
    name = graph.transpose(name, (0, 2, 1, 3, 4), f"{path}.windows.ordered")
    return x.renamed(graph.reshape(name, (-1, window, window, dim), f"{path}.windows"))


def _unpartition(graph: Graph, name: str, side: int, window: int, dim: int, path: str) -> str:
    """[windows, window, window, dim] to [1, side, side, dim]."""
    margin = -side % window
    count, whole = (side + margin) // window, side + margin
    name = graph.reshape(name, (count, count, window, window, dim), f"{path}.joining")
    name = graph.transpose(name, (0, 2, 1, 3, 4), f"{path}.joined")
    name = graph.reshape(name, (1, whole, whole, dim), f"{path}.grid")
    if margin:
        name = graph.slice(name, 0, side, 1, f"{path}.rows")
        name = graph.slice(name, 0, side, 2, f"{path}.columns")
    return name


def _add_positions(
    graph: Graph, attention: Attention, logits: str, query: str, size: int, path: str
) -> str:
    """Add relative positions to [windows, heads, n, n] logits, from the unscaled query."""
    heads, head_dim = attention.num_heads, attention.proj.in_features // attention.num_heads
    grid = graph.reshape(query, (-1, size, size, head_dim), f"{path}.query.grid")
    table = _table(graph, attention.rel_pos_h, size, f"{path}.rel_pos_h")
    by_row = graph.node("MatMul", [grid, table], f"{path}.bias_h")
    turned = graph.transpose(grid, (0, 2, 1, 3), f"{path}.query.turned")
    table = _table(graph, attention.rel_pos_w, size, f"{path}.rel_pos_w")
    by_column = graph.node("MatMul", [turned, table], f"{path}.bias_w.turned")
    by_column = graph.transpose(by_column, (0, 2, 1, 3), f"{path}.bias_w")
    by_row = graph.reshape(by_row, (0, size, size, size, 1), f"{path}.bias_h.column")
    by_column = graph.reshape(by_column, (0, size, size, 1, size), f"{path}.bias_w.row")
    whole = graph.reshape(logits, (-1, size, size, size, size), f"{path}.logits.grid")
    both = graph.node("Add", [by_row, by_column], f"{path}.bias")
    placed = graph.node("Add", [whole, both], f"{path}.logits.placed")
    tokens = size * size
    return graph.reshape(placed, (-1, heads, tokens, tokens), f"{path}.logits.all")


def _table(graph: Graph, table: Tensor, size: int, path: str) -> str:
    """Relative positions of one axis as [queries, head_dim, keys].

    The file holds one row a distance; runtimes pick them out when they load it.
    """
    rows = graph.constant(path, array(table_of_size(table, size)))
    chosen = graph.node("Gather", [rows, _rows(graph, size)], f"{path}.chosen", axis=0)
    return graph.transpose(chosen, (0, 2, 1), f"{path}.table")


def _rows(graph: Graph, size: int) -> str:
    return graph.shared(f"{_PATH}.distances.{size}", relative_rows(size).numpy())
