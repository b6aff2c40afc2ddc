"""A whole quantized SAM in integer form."""

from __future__ import annotations

import copy
from typing import Any

from ptq4sam.deploy.integer.attention import IntegerDecoderAttention, IntegerEncoderAttention
from ptq4sam.deploy.integer.layers import integer_layer
from ptq4sam.model.attention import QuantizedDecoderAttention, QuantizedEncoderAttention
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.model.layers import QuantizedConv2d, QuantizedLinear
from ptq4sam.sam.model import Sam


def integer_model(sam: QuantizedSam) -> Sam:
    """A copy of a frozen quantized SAM whose quantized operators compute with integer codes.

    It has the same module tree and is used like any other SAM, by `Predictor` or `evaluate`. Layer
    norms, activation functions, softmax, residual sums and what the scheme leaves float are
    computed in float32, as in the simulation. It is a reference: exact, not fast.

    Raises:
        DeployError: an operator has no exact integer form; the message names it.
        CalibrationError: the model was not calibrated.
    """
    # A copy of each quantized module is already known to deepcopy: its integer form.
    known: dict[int, Any] = {}
    for name, module in sam.named_modules():
        if isinstance(module, QuantizedEncoderAttention):
            known[id(module)] = IntegerEncoderAttention(module, name)
        elif isinstance(module, QuantizedDecoderAttention):
            known[id(module)] = IntegerDecoderAttention(module, name)
        elif isinstance(module, QuantizedLinear | QuantizedConv2d) and not _within(name, sam):
            known[id(module)] = integer_layer(module, name)
    copied = Sam(
        sam.name,
        copy.deepcopy(sam.image_encoder, dict(known)),
        copy.deepcopy(sam.prompt_encoder),
        copy.deepcopy(sam.mask_decoder, dict(known)),
        sam.normalization,
    )
    return copied.eval().requires_grad_(False).to(sam.device)


def _within(name: str, sam: QuantizedSam) -> bool:
    """Whether a layer belongs to an attention, which converts it itself."""
    owner = sam.get_submodule(name.rpartition(".")[0])
    return isinstance(owner, QuantizedEncoderAttention | QuantizedDecoderAttention)
