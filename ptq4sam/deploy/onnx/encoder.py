"""SAM's image encoder as an ONNX graph: `image` to `embedding`."""

from __future__ import annotations

from typing import cast

import numpy as np
from torch import nn

from ptq4sam.deploy.onnx.attention import operands
from ptq4sam.deploy.onnx.graph import Graph
from ptq4sam.deploy.onnx.grid_attention import attend_in_grid
from ptq4sam.deploy.onnx.layers import (
    apply_linear,
    array,
    layer_norm,
    mlp_block,
    patches,
    quantize_input,
    sequential,
)
from ptq4sam.deploy.onnx.values import Value
from ptq4sam.families.sam_vit.image_encoder import Attention, Block, ImageEncoderViT

_PATH = "image_encoder"


def encoder_graph(encoder: ImageEncoderViT, signed: bool = False, exact: bool = True) -> Graph:
    """The encoder, float or quantized, for one normalised and padded picture.

    Input `image` [1, 3, side, side], output `embedding` [1, channels, rows, columns], float32.

    `signed` and `exact` are as for `Graph`.

    Raises:
        DeployError: a part has no exact form.
    """
    graph = Graph("image_encoder", signed, exact)
    side = encoder.img_size
    embedding = encoder.patch_embed.proj
    rows = side // embedding.kernel_size[0]
    image = graph.input("image", np.float32, [1, embedding.in_channels, side, side])
    x = patches(graph, embedding, image, side, f"{_PATH}.patch_embed.proj")
    if encoder.pos_embed is not None:
        positions = graph.parameter(f"{_PATH}.pos_embed", array(encoder.pos_embed))
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
    dim = attention.proj.in_features
    # Three products instead of one that would be cut in three.
    parts = [
        apply_linear(
            graph, attention.qkv, codes, f"{path}.qkv.{role}", slice(n * dim, (n + 1) * dim)
        )
        for n, role in enumerate(("query", "key", "value"))
    ]
    given = operands(graph, attention, parts, size * size, path)
    grids = (-(-side // window)) ** 2 if window else 1
    attended = attend_in_grid(graph, attention, given, size, grids, path)
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
