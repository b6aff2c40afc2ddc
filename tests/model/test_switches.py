"""Single quantizers of a frozen model on and off, against a model that was toggled by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ptq4sam.methods import bimodal
from ptq4sam.model.calibration import CalibrationItem, calibrate
from ptq4sam.model.insertion import QuantizedSam, insert_quantizers
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.model.switches import Switches
from ptq4sam.quantization.modes import quantizers
from ptq4sam.quantization.quantizers import Mode
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam

Forward = Callable[[Sam], tuple[Tensor, ...]]

WEIGHT = "mask_decoder.transformer.final_attn_token_to_image.k_proj.weight_quantizer"
SOME = {
    WEIGHT,
    "image_encoder.blocks.1.attn.core.softmax_quantizer",
    "image_encoder.neck.2.weight_quantizer",
}


@pytest.fixture
def scheme(make_scheme: Callable[..., Scheme], monkeypatch: pytest.MonkeyPatch) -> Scheme:
    """With signs folded wherever bimodal integration looks."""
    monkeypatch.setattr(bimodal, "is_bimodal", lambda *_: True)
    return make_scheme()


@pytest.fixture
def by_hand(sam: Sam, items: list[CalibrationItem], scheme: Scheme) -> QuantizedSam:
    """Calibrated, but not frozen: its weights are still the float ones."""
    model = insert_quantizers(sam, scheme)
    calibrate(model, items[:2])
    return model


@pytest.mark.parametrize("kind", ["only", "all but"])
def test_switches_do_what_modes_do_before_freezing(
    kind: str,
    sam: Sam,
    items: list[CalibrationItem],
    scheme: Scheme,
    by_hand: QuantizedSam,
    forward: Forward,
) -> None:
    frozen = quantize_sam(sam, items[:2], scheme)
    assert frozen.folded
    before = forward(frozen)
    switches = Switches(frozen, sam)
    names = SOME if kind == "only" else switches.names - SOME
    for name, quantizer in quantizers(by_hand):
        quantizer.mode = Mode.QUANTIZE if name in names else Mode.FLOAT
    with switches.only(names):
        assert all(map(torch.equal, forward(frozen), forward(by_hand)))
    assert all(map(torch.equal, forward(frozen), before))


def test_with_all_off_it_is_the_float_model(
    sam: Sam, items: list[CalibrationItem], scheme: Scheme, forward: Forward
) -> None:
    frozen = quantize_sam(sam, items[:2], scheme)
    exact = forward(sam)
    with Switches(frozen, sam).only(()):
        off = forward(frozen)
    for found, expected in zip(off, exact, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(forward(frozen)[0], exact[0], rtol=1e-2, atol=1e-2)


def test_an_error_puts_modes_and_weights_back(
    sam: Sam, items: list[CalibrationItem], scheme: Scheme, forward: Forward
) -> None:
    frozen = quantize_sam(sam, items[:2], scheme)
    before = forward(frozen)
    with pytest.raises(KeyError), Switches(frozen, sam).only(()):
        raise KeyError
    assert all(map(torch.equal, forward(frozen), before))


def test_signs_are_told_where_a_method_moved_biases(
    sam: Sam, items: list[CalibrationItem], scheme: Scheme, forward: Forward
) -> None:
    changed = copy.deepcopy(sam)
    for name, layer in changed.named_modules():
        if name.endswith("k_proj"):
            # The same for all keys: an attention does not see it, but centring moves it far.
            layer.get_parameter("bias").data.fill_(10.0)
    frozen = quantize_sam(changed, items[:2], scheme.with_overrides("methods=[key-centring]"))
    assert frozen.folded
    exact = forward(changed)
    with Switches(frozen, changed).only(()):
        for found, expected in zip(forward(frozen), exact, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["norm-scales", "aqer", "mac", "acnr", "pcc"])
def test_what_methods_do_to_weights_is_taken_back(
    method: str, sam: Sam, items: list[CalibrationItem], scheme: Scheme, forward: Forward
) -> None:
    frozen = quantize_sam(sam, items[:2], scheme.with_overrides(f"methods=[{method}]"))
    exact = forward(sam)
    with Switches(frozen, sam).only(()):
        for found, expected in zip(forward(frozen), exact, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
