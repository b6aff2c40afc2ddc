from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from ptq4sam.errors import CalibrationError, ConfigError
from ptq4sam.methods.adaptive_granularity import AdaptiveGranularityQuantizer
from ptq4sam.methods.method import METHODS, Method
from ptq4sam.model.insertion import insert_quantizers, model_units
from ptq4sam.operators.base import quantized_layers
from ptq4sam.quantization.modes import quantizer_mode, quantizers
from ptq4sam.quantization.quantizers import Mode
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.records import NoSettings
from ptq4sam.sam.model import Sam

Forward = Callable[[Sam], tuple[Tensor, ...]]
MakeScheme = Callable[..., Scheme]


def test_float_mode_is_the_float_model(sam: Sam, make_scheme: MakeScheme, forward: Forward) -> None:
    expected = forward(sam)
    quantized = insert_quantizers(sam, make_scheme())
    with quantizer_mode(quantized, Mode.FLOAT):
        found = forward(quantized)
    for ours, reference in zip(found, expected, strict=True):
        # Portable functions are not torch's own, patches have 21 bits.
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


def test_insertion_leaves_the_float_model_alone(sam: Sam, make_scheme: MakeScheme) -> None:
    before = {name: value.clone() for name, value in sam.state_dict().items()}
    insert_quantizers(sam, make_scheme())
    assert sam.state_dict().keys() == before.keys()
    assert all(torch.equal(sam.state_dict()[name], value) for name, value in before.items())


def test_every_listed_layer_and_activation_has_a_quantizer(
    sam: Sam, make_scheme: MakeScheme
) -> None:
    quantized = insert_quantizers(sam, make_scheme())
    # Two blocks of qkv, proj, lin1, lin2 and two neck convolutions; two decoder layers of three
    # attentions with four projections and two MLP layers; the final attention's projections.
    layers = 2 * 4 + 2 + 2 * (3 * 4 + 2) + 4
    attentions = 2 + 2 * 3 + 1
    assert len(quantized_layers(quantized)) == layers
    assert len(list(quantizers(quantized))) == 2 * layers + 4 * attentions
    softmax = [q for name, q in quantizers(quantized) if name.endswith("softmax_quantizer")]
    assert len(softmax) == attentions
    assert all(isinstance(q, AdaptiveGranularityQuantizer) for q in softmax)


def test_adaptive_granularity_of_the_decoder_alone(sam: Sam, make_scheme: MakeScheme) -> None:
    quantized = insert_quantizers(sam, make_scheme(ptq4sam={"AGQ": "decoder"}))
    adaptive = {
        name.startswith("mask_decoder."): isinstance(q, AdaptiveGranularityQuantizer)
        for name, q in quantizers(quantized)
        if name.endswith("softmax_quantizer")
    }
    assert adaptive == {False: False, True: True}


def test_half_precision_is_the_default_and_leaves_the_float_model_alone(
    sam: Sam, make_scheme: MakeScheme
) -> None:
    assert Scheme.from_dict({**make_scheme().to_dict(), "float_weights": "float16"}) == (
        Scheme(make_scheme().a_qconfig, make_scheme().w_qconfig, ptq4sam=make_scheme().ptq4sam)
    )
    before = sam.image_encoder.pos_embed
    assert before is not None
    exact = before.clone()
    quantized = insert_quantizers(sam, make_scheme(float_weights="float16"))
    assert torch.equal(before, exact)
    assert torch.equal(quantized.image_encoder.pos_embed, exact.half().float())  # type: ignore[arg-type]


def test_decoder_only_leaves_the_encoder_float(sam: Sam, make_scheme: MakeScheme) -> None:
    quantized = insert_quantizers(sam, make_scheme(), quantize_encoder=False)
    assert not list(quantizers(quantized.image_encoder))
    assert all(name.startswith("mask_decoder.transformer") for name, _ in model_units(quantized))


def test_units_are_all_layers_once(sam: Sam, make_scheme: MakeScheme) -> None:
    quantized = insert_quantizers(sam, make_scheme())
    inside = [
        id(layer) for _, unit in model_units(quantized) for _, layer in quantized_layers(unit)
    ]
    assert sorted(inside) == sorted(id(layer) for _, layer in quantized_layers(quantized))


def test_uncalibrated_model_names_its_quantizer(
    sam: Sam, make_scheme: MakeScheme, forward: Forward
) -> None:
    with pytest.raises(CalibrationError, match=r"blocks\.0\.attn\.qkv"):
        forward(insert_quantizers(sam, make_scheme()))


def test_what_has_no_quantized_form_is_named(sam: Sam, make_scheme: MakeScheme) -> None:
    class Scaled(nn.Linear):
        """Not the operator that the registry knows."""

    sam.image_encoder.blocks[1].mlp.lin1 = Scaled(32, 128)
    with pytest.raises(ConfigError, match=r"blocks\.1\.mlp\.lin1 is .* a Scaled has no quantized"):
        insert_quantizers(sam, make_scheme())


def test_what_is_in_no_list_is_named(sam: Sam, make_scheme: MakeScheme) -> None:
    sam.image_encoder.blocks[1].mlp.lin3 = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"blocks\.1\.mlp\.lin3 \(Linear\) is in no list"):
        insert_quantizers(sam, make_scheme())


def test_a_convolution_that_is_padded_otherwise_is_named(sam: Sam, make_scheme: MakeScheme) -> None:
    sam.image_encoder.neck[2].padding_mode = "reflect"
    with pytest.raises(ConfigError, match=r"neck\.2: a convolution pads with reflect"):
        insert_quantizers(sam, make_scheme())


def test_roles_that_a_method_brings_are_checked_too(
    sam: Sam, make_scheme: Callable[..., Scheme], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(METHODS, "_items", dict(METHODS._items))

    @METHODS.register("misnaming")
    class _Misnaming(Method[NoSettings]):
        slots: ClassVar = {"input@after-gleu": {"bit": 8}}

    with pytest.raises(ConfigError, match=r"methods\.misnaming\.slots\..* 'after-gelu'"):
        insert_quantizers(sam, make_scheme(methods=["misnaming"]))


@pytest.mark.parametrize(
    ("selector", "instead"),
    [
        ("softmax@after-gelu", r"no such slot; roles of its softmax are .*attention"),
        ("input@encoder@after-relu", "no such slot; roles of its input are .*after-relu"),
        ("state", "no such slot; its slots are input, key, query, softmax, value, weight"),
    ],
)
def test_a_slot_that_the_model_has_not_is_named(
    sam: Sam, make_scheme: MakeScheme, selector: str, instead: str
) -> None:
    with pytest.raises(ConfigError, match=rf"slots\.{selector}: the model has {instead}"):
        insert_quantizers(sam, make_scheme(slots={selector: {"bit": 6}}))
