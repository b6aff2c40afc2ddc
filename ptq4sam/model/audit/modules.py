"""The list of what is quantized and what stays float, and a model's modules compared with it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ptq4sam.model.audit.report import EncoderState, Finding
from ptq4sam.model.insertion import ENCODER, QuantizedSam
from ptq4sam.operators.base import WEIGHT, as_operator, form_of, quantized_operators
from ptq4sam.quantization.levels import FLOAT
from ptq4sam.quantization.modes import quantizers
from ptq4sam.sam.description import network_of

DECODER = "mask_decoder"


def missed_modules(sam: QuantizedSam) -> Iterator[Finding]:
    """Modules that are float though the list says otherwise, or that are in no list."""
    state = encoder_state(sam)
    float_encoder = sam.encoder_quantized and state == FLOAT and not _is_kept_float(sam)
    if float_encoder:
        yield Finding(ENCODER, "is float, the model says that its encoder is quantized")
    if not sam.encoder_quantized and state != FLOAT:
        yield Finding(ENCODER, f"is {state}, the model says that its encoder is float")
    inner = {id(part) for _, quantizer in quantizers(sam) for part in quantizer.modules()}
    for name, module in sam.named_modules():
        told = float_encoder and name.startswith(ENCODER)
        if as_operator(module) is not None or id(module) in inner:
            continue
        if must_be_quantized(name, sam):
            if not told:
                yield Finding(name, "is listed as quantized but is a float operator")
        elif _computes(module) and not _is_listed(name, sam):
            problem = "is in no list: neither quantized nor known to be float"
            yield Finding(name, f"{problem} ({type(module).__name__})")


def encoder_state(sam: QuantizedSam) -> EncoderState:
    """Whether the image encoder's operators are quantized, by what they are."""
    quantized = len(quantized_operators(sam.image_encoder))
    if quantized == 0:
        return FLOAT
    return "quantized" if quantized >= len(_listed_in_encoder(sam)) else "quantized in part"


def must_be_quantized(name: str, sam: QuantizedSam) -> bool:
    """Whether the list has this operator as a quantized one, and the scheme excepts it not."""
    listed = sam.description.place_of(name) is not None
    counts = sam.encoder_quantized or network_of(name) != "encoder"
    return listed and counts and sam.level_of(name) != FLOAT


def may_multiply_floats(name: str, sam: QuantizedSam) -> bool:
    """Whether the list, or an exception of the scheme, leaves a module's products float."""
    if sam.description.may_multiply(name):
        return True
    return sam.description.place_of(name) is not None and not must_be_quantized(name, sam)


def slot_of(quantizer: str, sam: QuantizedSam) -> tuple[str, frozenset[str]]:
    """Slot and roles of a quantizer by its path."""
    owner, _, name = quantizer.rpartition(".")
    slot = name.removesuffix("_quantizer")
    operator = as_operator(sam.get_submodule(owner))
    kind = set() if operator is None else {operator.kind}
    return slot, sam.description.roles(owner, slot) | kind


def expected_activations(sam: QuantizedSam) -> int:
    """How many activations the list has for this model: all slots of operators but weights."""
    forms = (
        form_of(module) for name, module in sam.named_modules() if must_be_quantized(name, sam)
    )
    return sum(len({*form.slot_names} - {WEIGHT}) for form in forms if form is not None)


def _listed_in_encoder(sam: QuantizedSam) -> list[str]:
    names = [name for name, _ in sam.named_modules() if network_of(name) == "encoder"]
    return [name for name in names if sam.description.place_of(name) is not None]


def _is_kept_float(sam: QuantizedSam) -> bool:
    """Whether the scheme keeps each operator of the image encoder float."""
    listed = _listed_in_encoder(sam)
    return bool(listed) and not any(must_be_quantized(name, sam) for name in listed)


def _computes(module: nn.Module) -> bool:
    """Whether a module has numbers of its own."""
    return bool([*module.parameters(recurse=False), *module.buffers(recurse=False)])


def _is_listed(name: str, sam: QuantizedSam) -> bool:
    return sam.description.place_of(name) is not None or sam.description.may_hold(name)
