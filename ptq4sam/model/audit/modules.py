"""The list of what is quantized and what stays float, and a model's modules compared with it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from ptq4sam.model.attention import QuantizedDecoderAttention, QuantizedEncoderAttention
from ptq4sam.model.audit.report import EncoderState, Finding
from ptq4sam.model.insertion import ENCODER, QuantizedSam
from ptq4sam.model.layers import QuantizedConv2d, QuantizedLinear, quantized_layers
from ptq4sam.quantization.observers import Observer
from ptq4sam.quantization.quantizers import Quantizer
from ptq4sam.quantization.scheme import FLOAT, Scheme
from ptq4sam.sam import image_encoder, transformer
from ptq4sam.sam.common import LayerNorm2d

DECODER = "mask_decoder"
_ENCODER_LAYER = re.compile(
    r"image_encoder\.(blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(lin1|lin2))|neck\.(0|2))"
)
_ENCODER_ATTENTION = re.compile(r"image_encoder\.blocks\.\d+\.attn")
_DECODER_ATTENTION = re.compile(
    r"mask_decoder\.transformer\.(layers\.\d+\.(self_attn|cross_attn_token_to_image|"
    r"cross_attn_image_to_token)|final_attn_token_to_image)"
)
_DECODER_LAYER = re.compile(
    rf"{_DECODER_ATTENTION.pattern}\.(q_proj|k_proj|v_proj|out_proj)|"
    r"mask_decoder\.transformer\.layers\.\d+\.mlp\.(lin1|lin2)"
)
_FLOAT_PRODUCT = re.compile(
    r"image_encoder\.patch_embed\.proj|prompt_encoder(\.pe_layer|\.mask_downscaling\.(0|3|6))?|"
    r"mask_decoder\.(output_upscaling\.(0|3)|output_hypernetworks_mlps\.[0-3]\.layers\.[0-2]|"
    r"iou_prediction_head\.layers\.[0-2])"
)
_FLOAT_TABLE = re.compile(
    r"|image_encoder|prompt_encoder\.(pe_layer|point_embeddings\.[0-3]|not_a_point_embed|"
    r"no_mask_embed)|mask_decoder\.(iou_token|mask_tokens)"
)
_NORMS = (nn.LayerNorm, LayerNorm2d)
_QUANTIZED_LAYERS = (QuantizedLinear, QuantizedConv2d)
_QUANTIZED_ATTENTIONS = (QuantizedEncoderAttention, QuantizedDecoderAttention)


def missed_modules(sam: QuantizedSam) -> Iterator[Finding]:
    """Modules that are float though the list says otherwise, or that are in no list."""
    state = encoder_state(sam)
    float_encoder = sam.encoder_quantized and state == FLOAT and not _is_kept_float(sam)
    if float_encoder:
        yield Finding(ENCODER, "is float, the model says that its encoder is quantized")
    if not sam.encoder_quantized and state != FLOAT:
        yield Finding(ENCODER, f"is {state}, the model says that its encoder is float")
    for name, module in sam.named_modules():
        told = float_encoder and name.startswith(ENCODER)
        if isinstance(module, _QUANTIZED_LAYERS + _QUANTIZED_ATTENTIONS):
            continue
        if must_be_quantized(name, sam) and not told:
            yield Finding(name, "is listed as quantized but is a float layer")
        if _must_attend_quantized(name, sam) and not told:
            yield Finding(name, "its query, key, value and softmax pass no quantizer")
        if _computes(module) and not _is_listed(name):
            problem = "is in no list: neither quantized nor known to be float"
            yield Finding(name, f"{problem} ({type(module).__name__})")


def encoder_state(sam: QuantizedSam) -> EncoderState:
    """Whether the image encoder's layers are quantized, by what they are."""
    quantized = sum(name.startswith(f"{ENCODER}.") for name, _ in quantized_layers(sam))
    listed = sum(1 for name, _ in sam.named_modules() if _ENCODER_LAYER.fullmatch(name))
    if quantized == 0:
        return FLOAT
    return "quantized" if quantized >= listed else "quantized in part"


def must_be_quantized(name: str, sam: QuantizedSam) -> bool:
    """Whether the list has this layer among the quantized ones, and the scheme excepts it not."""
    listed = _DECODER_LAYER.fullmatch(name) or (
        sam.encoder_quantized and _ENCODER_LAYER.fullmatch(name)
    )
    return bool(listed) and exception(name, sam.scheme) != FLOAT


def may_multiply_floats(name: str, sam: QuantizedSam) -> bool:
    """Whether the list, or an exception of the scheme, leaves a module's products float."""
    if _FLOAT_PRODUCT.fullmatch(name):
        return True
    encoder = _ENCODER_LAYER.fullmatch(name) or _ENCODER_ATTENTION.fullmatch(name)
    decoder = _DECODER_LAYER.fullmatch(name) or _DECODER_ATTENTION.fullmatch(name)
    if encoder and not sam.encoder_quantized:
        return True
    return bool(encoder or decoder) and exception(name, sam.scheme) == FLOAT


def exception(name: str, scheme: Scheme) -> int | str | None:
    """What the scheme says of the unit that something belongs to, where it is an exception."""
    for unit, level in scheme.units.items():
        if name == unit or name.startswith(f"{unit}."):
            return level
    return None


def expected_activations(sam: QuantizedSam) -> int:
    """How many activations the list has for this model: layer inputs, and 4 an attention."""
    layers = sum(must_be_quantized(name, sam) for name, _ in sam.named_modules())
    attentions = sum(isinstance(module, _QUANTIZED_ATTENTIONS) for module in sam.modules())
    return layers + 4 * attentions


def _is_kept_float(sam: QuantizedSam) -> bool:
    """Whether the scheme keeps each layer of the image encoder float."""
    layers = [name for name, _ in sam.named_modules() if _ENCODER_LAYER.fullmatch(name)]
    return bool(layers) and not any(must_be_quantized(name, sam) for name in layers)


def _must_attend_quantized(name: str, sam: QuantizedSam) -> bool:
    listed = _DECODER_ATTENTION.fullmatch(name) or (
        sam.encoder_quantized and _ENCODER_ATTENTION.fullmatch(name)
    )
    return bool(listed) and exception(name, sam.scheme) != FLOAT


def _computes(module: nn.Module) -> bool:
    """Whether a module has numbers of its own, but for norms, attentions and quantizers."""
    known = (*_NORMS, image_encoder.Attention, transformer.Attention, Quantizer, Observer)
    if isinstance(module, known):
        return False
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return bool(own)


def _is_listed(name: str) -> bool:
    return any(
        pattern.fullmatch(name)
        for pattern in (_ENCODER_LAYER, _DECODER_LAYER, _FLOAT_PRODUCT, _FLOAT_TABLE)
    )
