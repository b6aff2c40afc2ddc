"""The operations of a SAM, counted on the meta device: no weight is made, nothing computed.

Counted are multiply-accumulates: of layers with weights, of the two products of every attention, of
relative positions, of the hypernetworks' product with the upscaled embedding. Windows count with
their padding, which is computed like the rest. Not counted is what has no multiplication of two
operands: norms, softmax, activation functions, sums.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ptq4sam.model.attention import QuantizedDecoderAttention, QuantizedEncoderAttention
from ptq4sam.model.layers import QuantizedConv2d, QuantizedLinear
from ptq4sam.quantization.modes import quantizer_mode
from ptq4sam.quantization.quantizers import Mode
from ptq4sam.sam import image_encoder, transformer
from ptq4sam.sam.model import Sam

FLOAT_BITS = 32

_PARTS = (
    (r"image_encoder\.patch_embed", "patch embedding"),
    (r"image_encoder\.pos_embed", "position embedding"),
    (r"image_encoder\..*rel_pos_", "relative positions"),
    (r"image_encoder\..*attn\.qkv", "encoder qkv"),
    (r"image_encoder\..*attn\.proj", "encoder proj"),
    (r"image_encoder\..*mlp\.", "encoder MLP"),
    (r"image_encoder\.neck\.[02]", "encoder neck"),
    (r"image_encoder\.", "encoder norms"),
    (r"prompt_encoder\.", "prompt encoder"),
    (r"mask_decoder\.transformer\..*_proj", "decoder projections"),
    (r"mask_decoder\.transformer\..*mlp\.", "decoder MLP"),
    (r"mask_decoder\.transformer\.", "decoder norms"),
    (r"mask_decoder\.", "decoder heads"),
)
WINDOWS = "encoder attention in windows"
GLOBAL = "encoder attention, global"
DECODER = "decoder attention"
_RELATIVE = "relative positions"
_HEADS = "decoder heads"


@dataclass(frozen=True)
class Operation:
    """One layer or product.

    Attributes:
        part: what it belongs to.
        name: its path in the model.
        macs: multiply-accumulates.
        bits: of its two operands.
        read: elements and bits of each activation that it reads.
    """

    part: str
    name: str
    macs: int
    bits: tuple[int, int]
    read: tuple[tuple[int, int], ...]


@torch.no_grad()
def operations(sam: Sam, boxes: int = 1) -> list[Operation]:
    """Every operation of one picture and its box prompts, in order.

    Args:
        sam: a model on the meta device.
        boxes: box prompts.
    """
    found: list[Operation] = []
    handles = [
        module.register_forward_hook(_watch(name, module, found))
        for name, module in sam.named_modules()
        if isinstance(
            module,
            nn.Linear
            | nn.Conv2d
            | nn.ConvTranspose2d
            | image_encoder.Attention
            | transformer.Attention,
        )
    ]
    side, decoder = sam.image_size, sam.mask_decoder
    try:
        with quantizer_mode(sam, Mode.FLOAT):
            features = sam.image_encoder(torch.empty(1, 3, side, side, device="meta"))
            corners = torch.empty(boxes, 4, device="meta")
            sparse, dense = sam.prompt_encoder(boxes=corners)
            positions = sam.prompt_encoder.dense_positions()
            masks, _ = decoder.predict_all(features, positions, sparse, dense)
    finally:
        for handle in handles:
            handle.remove()
    # Fourier features of the grid's cells and of the boxes' corners: two coordinates each.
    coordinates = 2 * (positions[0, 0].numel() + 2 * boxes)
    macs = coordinates * (sam.prompt_encoder.embed_dim // 2)
    found.append(_float_operation("prompt encoder", "prompt_encoder.pe_layer", macs, coordinates))
    # Hypernetworks' answers times the upscaled embedding.
    channels = sam.prompt_encoder.embed_dim // 8
    read = boxes * channels * (decoder.num_mask_tokens + masks[0, 0].numel())
    found.append(_float_operation(_HEADS, "mask_decoder.masks", masks.numel() * channels, read))
    return found


def _watch(name: str, module: nn.Module, found: list[Operation]) -> Any:
    """A hook that counts what a module did."""

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, image_encoder.Attention):
            found.extend(_encoder_attention(name, module, inputs[0]))
        elif isinstance(module, transformer.Attention):
            found.extend(_decoder_attention(name, module, inputs))
        else:
            found.append(_layer(name, module, inputs[0], output))

    return hook


def _layer(name: str, layer: nn.Module, x: Tensor, output: Tensor) -> Operation:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    # Each input of a transposed convolution, each output of the others, meets one filter.
    places = x if isinstance(layer, nn.ConvTranspose2d) else output
    macs = places.numel() * weight[0].numel()
    bits = (FLOAT_BITS, FLOAT_BITS)
    if isinstance(layer, QuantizedLinear | QuantizedConv2d):
        bits = (layer.input_quantizer.grid.bits, layer.weight_quantizer.grid.bits)
    return Operation(part_of(name), name, macs, bits, ((x.numel(), bits[0]),))


def _encoder_attention(
    name: str, attention: image_encoder.Attention, x: Tensor
) -> Iterator[Operation]:
    batch, rows, columns, dim = x.shape
    tokens = batch * rows * columns
    part = GLOBAL if batch == 1 else WINDOWS
    softmax = tokens * attention.num_heads * rows * columns
    yield from _products(part, name, attention, tokens * dim, tokens * dim, softmax)
    if attention.use_rel_pos:
        query = _attention_bits(attention)[0]
        macs = tokens * dim * (rows + columns)
        read = ((tokens * dim, query),)
        yield Operation(_RELATIVE, f"{name}.rel_pos", macs, (query, FLOAT_BITS), read)


def _decoder_attention(
    name: str, attention: transformer.Attention, inputs: tuple[Tensor, ...]
) -> Iterator[Operation]:
    q, k, _ = inputs
    width = attention.q_proj.out_features
    query, key = q[..., 0].numel(), k[..., 0].numel()
    softmax = query * k.shape[1] * attention.num_heads
    yield from _products(DECODER, name, attention, query * width, key * width, softmax)


def _products(
    part: str,
    name: str,
    attention: image_encoder.Attention | transformer.Attention,
    query: int,
    key: int,
    softmax: int,
) -> Iterator[Operation]:
    """Logits and their product with the values; elements of query, of key or value, of softmax."""
    q_bits, k_bits, v_bits, softmax_bits = _attention_bits(attention)
    output = (
        attention.proj if isinstance(attention, image_encoder.Attention) else attention.out_proj
    )
    width = output.in_features
    # Each logit, and each share of a value, is as many products as a head has channels.
    macs = softmax * (width // attention.num_heads)
    read = ((query, q_bits), (key, k_bits))
    yield Operation(part, f"{name}.query_key", macs, (q_bits, k_bits), read)
    read = ((softmax, softmax_bits), (key, v_bits))
    yield Operation(part, f"{name}.attention_value", macs, (softmax_bits, v_bits), read)


def _attention_bits(attention: nn.Module) -> tuple[int, int, int, int]:
    """Of query, key, value and softmax output."""
    if not isinstance(attention, QuantizedEncoderAttention | QuantizedDecoderAttention):
        return FLOAT_BITS, FLOAT_BITS, FLOAT_BITS, FLOAT_BITS
    return (
        attention.query_quantizer.grid.bits,
        attention.key_quantizer.grid.bits,
        attention.value_quantizer.grid.bits,
        attention.softmax_quantizer.grid.bits,
    )


def _float_operation(part: str, name: str, macs: int, read: int) -> Operation:
    return Operation(part, name, macs, (FLOAT_BITS, FLOAT_BITS), ((read, FLOAT_BITS),))


def part_of(name: str) -> str:
    """The part that a parameter or a layer belongs to, by its path in the model."""
    return next(part for pattern, part in _PARTS if re.match(pattern, name))
