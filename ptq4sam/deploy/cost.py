"""What a SAM computes and holds, counted on the meta device: no weight is made, nothing computed.

Counted are multiply-accumulates: of layers with weights, of the two products of every attention, of
relative positions, of the hypernetworks' product with the upscaled embedding. Windows count with
their padding, which is computed like the rest. Not counted is what has no multiplication of two
operands: norms, softmax, activation functions, sums.

An operation of an a-bit and a w-bit operand costs a * w bit operations (as of hardware whose
multipliers grow with both), or max(a, w) / 32 of a float operation (as of hardware that is limited
by the bits it moves); published tables use both.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ptq4sam.deploy.packing import packed_size
from ptq4sam.model.attention import QuantizedDecoderAttention, QuantizedEncoderAttention
from ptq4sam.model.float_weights import float_weights
from ptq4sam.model.insertion import insert_quantizers
from ptq4sam.model.layers import QuantizedConv2d, QuantizedLinear, quantized_layers
from ptq4sam.quantization.modes import quantizer_mode
from ptq4sam.quantization.quantizers import Mode
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam import image_encoder, transformer
from ptq4sam.sam.model import Sam
from ptq4sam.sam.registry import build_sam

FLOAT_BITS = 32
_HALF_BITS = 16
_CHANNEL_BYTES = 5
"""Of a weight's channel: a float32 scale and a zero point, which is a code of up to 8 bits."""

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
_WINDOWS = "encoder attention in windows"
_GLOBAL = "encoder attention, global"
_DECODER = "decoder attention"
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


@dataclass(frozen=True)
class PartCost:
    """One part of a model.

    Attributes:
        name: what it is.
        parameters: values that it holds.
        weight_bytes: that these take.
        float_weight_bytes: that they take in float32.
        macs: multiply-accumulates.
        bit_operations: sum of multiply-accumulates times the bits of both operands.
        float_operations: multiply-accumulates, each weighted by max(bits) / 32.
        activation_bytes: of all activations that its operations read.
        float_activation_bytes: the same in float32.
    """

    name: str
    parameters: int = 0
    weight_bytes: int = 0
    float_weight_bytes: int = 0
    macs: int = 0
    bit_operations: int = 0
    float_operations: float = 0.0
    activation_bytes: float = 0.0
    float_activation_bytes: int = 0

    def plus(self, other: PartCost) -> PartCost:
        """Both together, under this one's name."""
        mine, theirs = vars(self), vars(other)
        return PartCost(**{k: v if k == "name" else v + theirs[k] for k, v in mine.items()})


@dataclass(frozen=True)
class Cost:
    """A model by part, in the order of execution.

    Attributes:
        model: name of the SAM.
        boxes: prompts that are decoded for one picture.
        parts: all of it.
    """

    model: str
    boxes: int
    parts: tuple[PartCost, ...]

    @property
    def total(self) -> PartCost:
        """All parts together."""
        total = PartCost("total")
        for part in self.parts:
            total = total.plus(part)
        return total

    @property
    def storage_ratio(self) -> float:
        """Bytes of the float32 weights against those of the quantized ones."""
        return self.total.float_weight_bytes / self.total.weight_bytes

    @property
    def operations_ratio(self) -> float:
        """Float operations against weighted ones."""
        return self.total.macs / self.total.float_operations

    @property
    def layers_ratio(self) -> float:
        """As `operations_ratio`, but with the products of attentions at 32 bits.

        PTQ4SAM's 3.9 times for SAM-H at 6 bits comes out so.
        """
        products = [part for part in self.parts if part.name in (_WINDOWS, _GLOBAL, _DECODER)]
        dearer = sum(part.macs - part.float_operations for part in products)
        return self.total.macs / (self.total.float_operations + dearer)

    @property
    def bit_operations_ratio(self) -> float:
        """Bit operations in float32 against those at the bits that there are."""
        return self.total.macs * FLOAT_BITS**2 / self.total.bit_operations


def count(
    name: str, scheme: Scheme | None = None, *, quantize_encoder: bool = True, boxes: int = 1
) -> Cost:
    """Count a SAM for one picture.

    Args:
        name: vit_b, vit_l, vit_h or vit_nano.
        scheme: the quantization; None for the float model.
        quantize_encoder: quantize the image encoder too.
        boxes: box prompts on the picture.

    Raises:
        ConfigError: the name is unknown, or the scheme makes an exception for a unit that is not.
    """
    sam = meta_sam(name, scheme, quantize_encoder)
    parts: dict[str, PartCost] = {}

    def add(part: PartCost) -> None:
        parts[part.name] = parts.get(part.name, PartCost(part.name)).plus(part)

    for operation in operations(sam, boxes):
        add(_cost(operation))
    half = scheme is not None and scheme.float_weights == "float16"
    for path, values, size in storage(sam, half):
        add(PartCost(_part(path), values, size, FLOAT_BITS // 8 * values))
    return Cost(name, boxes, tuple(parts.values()))


def meta_sam(name: str, scheme: Scheme | None = None, quantize_encoder: bool = True) -> Sam:
    """A SAM without values, float or with quantizers."""
    with torch.device("meta"):
        sam = build_sam(name)
        if scheme is None:
            return sam
        # Rounding looks at values; that it is done is taken into account in counting.
        exact = replace(scheme, float_weights="float32")
        return insert_quantizers(sam, exact, quantize_encoder)


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
    return Operation(_part(name), name, macs, bits, ((x.numel(), bits[0]),))


def _encoder_attention(
    name: str, attention: image_encoder.Attention, x: Tensor
) -> Iterator[Operation]:
    batch, rows, columns, dim = x.shape
    tokens = batch * rows * columns
    part = _GLOBAL if batch == 1 else _WINDOWS
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
    yield from _products(_DECODER, name, attention, query * width, key * width, softmax)


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


def _cost(operation: Operation) -> PartCost:
    first, second = operation.bits
    return PartCost(
        operation.part,
        macs=operation.macs,
        bit_operations=operation.macs * first * second,
        float_operations=operation.macs * max(first, second) / FLOAT_BITS,
        activation_bytes=sum(elements * bits / 8 for elements, bits in operation.read),
        float_activation_bytes=sum(4 * elements for elements, _ in operation.read),
    )


def storage(sam: Sam, half: bool = False) -> Iterator[tuple[str, int, int]]:
    """Name, number of values and bytes of every parameter.

    A quantized weight takes its packed codes, and a scale and zero point for each of its channels.

    Args:
        sam: a model, on the meta device or not.
        half: what no quantizer touches takes half precision.
    """
    layers = {f"{name}.weight": layer for name, layer in quantized_layers(sam)}
    halved = float_weights(sam) if half else {}
    for name, tensor in sam.state_dict().items():
        if "_quantizer." in name:
            continue
        values = tensor.numel()
        size = values * (_HALF_BITS if name in halved else FLOAT_BITS) // 8
        if name in layers:
            layer = layers[name]
            size = packed_size(values, layer.weight_quantizer.grid.bits)
            channels = tensor.shape[0] if layer.weight_quantizer.channel_axis == 0 else 1
            size += channels * _CHANNEL_BYTES
        yield name, values, size


def _part(name: str) -> str:
    return next(part for pattern, part in _PARTS if re.match(pattern, name))
