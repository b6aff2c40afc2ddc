"""Put quantizers into a SAM: the table of what is quantized, and the order of the units.

Quantized: in the image encoder qkv, proj, lin1, lin2 and the two neck convolutions (weight and
input of each), query, key, value and softmax output; in the mask decoder's transformer the
projections, lin1 and lin2 (weight and input), query, key, value and softmax output. The same list
for every bit width, without an exception for first or last layers but those that a scheme lists.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import cast

from torch import nn

from ptq4sam.methods.adaptive_granularity import AdaptiveGranularityQuantizer
from ptq4sam.model.attention import (
    AttentionQuantizers,
    QuantizedDecoderAttention,
    QuantizedEncoderAttention,
)
from ptq4sam.model.float_weights import round_float_weights
from ptq4sam.model.layers import QuantizedConv2d, QuantizedLinear
from ptq4sam.model.portable_layers import make_portable
from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.modes import quantizers
from ptq4sam.quantization.quantizers import QUANTIZERS, Quantizer
from ptq4sam.quantization.scheme import Scheme, TensorFormat
from ptq4sam.records import unknown_key
from ptq4sam.sam import image_encoder, transformer
from ptq4sam.sam.common import MLPBlock
from ptq4sam.sam.image_encoder import ImageEncoderViT
from ptq4sam.sam.model import Sam
from ptq4sam.sam.stages import Stage
from ptq4sam.sam.transformer import TwoWayTransformer

ENCODER = "image_encoder"
TRANSFORMER = "mask_decoder.transformer"
"""Paths in a SAM of what is quantized."""

BIMODAL_KEY_OBSERVER = "AvgMSEFastObserver"
"""Observer of decoder keys under bimodal integration (PTQ4SAM's published setting)."""


@dataclass(frozen=True)
class QuantizerFactory:
    """Makes the quantizers that a scheme asks for."""

    scheme: Scheme

    def of_unit(self, name: str) -> QuantizerFactory | None:
        """The factory for one unit, by its path in the model; None for one that stays float."""
        scheme = self.scheme.of_unit(name)
        return None if scheme is None else QuantizerFactory(scheme)

    def weight(self) -> Quantizer:
        """Quantizer of a weight."""
        return _build(self.scheme.w_qconfig)

    def activation(self, observer: str | None = None) -> Quantizer:
        """Quantizer of an activation, with the scheme's observer or another."""
        return _build(self.scheme.a_qconfig, observer)

    def softmax(self, decoder: bool) -> Quantizer:
        """Quantizer of a softmax output."""
        methods = self.scheme.ptq4sam
        if methods.AGQ is True or (decoder and methods.AGQ == "decoder"):
            grid = Grid(self.scheme.a_qconfig.bit)
            return AdaptiveGranularityQuantizer(grid, methods.exact, methods.taus)
        return self.activation()

    def attention(self, decoder: bool) -> AttentionQuantizers:
        """The four activation quantizers of an attention."""
        bimodal = decoder and self.scheme.ptq4sam.BIG
        key = self.activation(BIMODAL_KEY_OBSERVER if bimodal else None)
        return AttentionQuantizers(self.activation(), key, self.activation(), self.softmax(decoder))

    def linear(self, layer: nn.Linear) -> QuantizedLinear:
        """A quantized linear layer with the weights of a float one."""
        return QuantizedLinear(layer, self.weight(), self.activation())

    def convolution(self, layer: nn.Conv2d) -> QuantizedConv2d:
        """A quantized convolution with the weights of a float one."""
        return QuantizedConv2d(layer, self.weight(), self.activation())


def _build(tensor_format: TensorFormat, observer: str | None = None) -> Quantizer:
    grid = Grid(tensor_format.bit, tensor_format.symmetric)
    channel_axis = None if tensor_format.ch_axis < 0 else tensor_format.ch_axis
    kind = QUANTIZERS[tensor_format.quantizer]
    return kind(grid, observer or tensor_format.observer, channel_axis)


class QuantizedSam(Sam):
    """A SAM with quantizers; evaluate it like a float one.

    Attributes:
        scheme: how it is quantized.
        encoder_quantized: whether the image encoder is quantized too (--quant-encoder).
        folded: names of the attentions whose signs bimodal integration folded.
    """

    def __init__(self, sam: Sam, scheme: Scheme, encoder_quantized: bool) -> None:
        parts = (sam.image_encoder, sam.prompt_encoder, sam.mask_decoder)
        super().__init__(sam.name, *parts, sam.normalization)
        self.to(sam.device)
        self.scheme = scheme
        self.encoder_quantized = encoder_quantized
        self.folded: list[str] = []


def insert_quantizers(sam: Sam, scheme: Scheme, quantize_encoder: bool = True) -> QuantizedSam:
    """Copy a float SAM and put quantizers into the copy, not yet calibrated.

    Raises:
        ConfigError: the scheme makes an exception for a unit that there is not.
    """
    quantized = QuantizedSam(copy.deepcopy(sam), scheme, quantize_encoder)
    _check_units(quantized)
    factory = QuantizerFactory(scheme)
    if quantize_encoder:
        insert_into_encoder(quantized.image_encoder, factory)
    insert_into_transformer(quantized.mask_decoder.transformer, factory)
    name_quantizers(quantized)
    make_portable(quantized, quantize_encoder)
    if scheme.float_weights == "float16":
        round_float_weights(quantized)
    # Quantizers were made on torch's default device.
    return quantized.eval().requires_grad_(False).to(sam.device)


def _check_units(sam: QuantizedSam) -> None:
    known = [name for name, _ in model_units(sam)]
    for name in sam.scheme.units:
        if name not in known:
            raise unknown_key(name, known).within("units")


def name_quantizers(module: nn.Module) -> None:
    """Tell each quantizer its path, for messages."""
    for name, quantizer in quantizers(module):
        quantizer.name = name


def insert_into_encoder(encoder: ImageEncoderViT, factory: QuantizerFactory) -> None:
    """Replace the layers and attentions of an image encoder in place."""
    for index, block in enumerate(encoder.blocks):
        block = cast(image_encoder.Block, block)
        of_unit = factory.of_unit(f"{ENCODER}.blocks.{index}.attn")
        if of_unit is not None:
            attention = block.attn
            block.attn = QuantizedEncoderAttention(
                attention,
                of_unit.linear(attention.qkv),
                of_unit.linear(attention.proj),
                of_unit.attention(decoder=False),
            )
        _insert_into_mlp(block.mlp, factory.of_unit(f"{ENCODER}.blocks.{index}.mlp"))
    of_unit = factory.of_unit(f"{ENCODER}.neck")
    if of_unit is not None:
        for index in (0, 2):
            encoder.neck[index] = of_unit.convolution(cast(nn.Conv2d, encoder.neck[index]))


def insert_into_transformer(two_way: TwoWayTransformer, factory: QuantizerFactory) -> None:
    """Replace the layers and attentions of a mask decoder's transformer in place."""
    for index, layer in enumerate(two_way.layers):
        layer = cast(transformer.TwoWayAttentionBlock, layer)
        path = f"{TRANSFORMER}.layers.{index}"
        for name in ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token"):
            attention = getattr(layer, name)
            setattr(layer, name, _decoder_attention(attention, factory.of_unit(f"{path}.{name}")))
        _insert_into_mlp(layer.mlp, factory.of_unit(f"{path}.mlp"))
    two_way.final_attn_token_to_image = _decoder_attention(
        two_way.final_attn_token_to_image,
        factory.of_unit(f"{TRANSFORMER}.final_attn_token_to_image"),
    )


def _decoder_attention(
    source: transformer.Attention, factory: QuantizerFactory | None
) -> transformer.Attention:
    if factory is None:
        return source
    projections: dict[str, nn.Module] = {
        name: factory.linear(getattr(source, name))
        for name in ("q_proj", "k_proj", "v_proj", "out_proj")
    }
    return QuantizedDecoderAttention(source, projections, factory.attention(decoder=True))


def _insert_into_mlp(mlp: MLPBlock, factory: QuantizerFactory | None) -> None:
    if factory is not None:
        mlp.lin1 = factory.linear(mlp.lin1)
        mlp.lin2 = factory.linear(mlp.lin2)


def model_units(sam: QuantizedSam) -> list[tuple[str, nn.Module]]:
    """All units of a model in execution order, with their paths in it."""
    parts: list[tuple[str, list[Stage]]] = []
    if sam.encoder_quantized:
        parts.append((ENCODER, sam.image_encoder.stages()))
    parts.append((TRANSFORMER, sam.mask_decoder.transformer.stages()))
    return [(f"{path}.{stage.name}", stage.unit) for path, stages in parts for stage in stages]
