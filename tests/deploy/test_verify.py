from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ptq4sam.deploy.reference import integer_model
from ptq4sam.deploy.verify import OperatorCheck, verify_operators, worst_first
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.operators.base import quantized_layers
from ptq4sam.sam.model import Sam

Forward = Callable[[Sam], tuple[Tensor, ...]]
Quantize = Callable[..., QuantizedSam]

_UNIFORM = {"BIG": True, "AGQ": False}


def weights(bits: int, **changes: object) -> dict[str, object]:
    formats = {"quantizer": "FixedFakeQuantize", "observer": "MinMaxObserver", "bit": bits}
    return {**formats, "ch_axis": 0, **changes}


SCHEMES: dict[str, tuple[int, dict[str, object]]] = {
    "W8A8": (8, {}),
    "W6A6": (6, {}),
    "W4A4": (4, {}),
    "W2A2": (2, {}),
    "W8A8 uniform softmax": (8, {"ptq4sam": _UNIFORM}),
    "W4A4 uniform softmax": (4, {"ptq4sam": _UNIFORM}),
    "W4A8, one scale": (8, {"w_qconfig": weights(4, ch_axis=-1)}),
    "signed": (
        8,
        {
            "w_qconfig": weights(8, symmetric=True),
            "a_qconfig": {**weights(8, symmetric=True), "ch_axis": -1},
            "ptq4sam": _UNIFORM,
        },
    ),
    "some units kept": (
        4,
        {"units": {"image_encoder.blocks.1.attn": "float", "image_encoder.blocks.1.mlp": 8}},
    ),
    "hybrid and grouped inputs, LNQ": (
        4,
        {
            "slots": {
                "input@after-gelu": {"grid": "hybrid"},
                "input@after-relu": {"grid": "hybrid"},
                "input@decoder": {"grid": "grouped"},
                "softmax": {"grid": "lnq"},
            }
        },
    ),
    "learned zero points": (
        6,
        {"a_qconfig": {**weights(6, quantizer="LSQPlusFakeQuantize"), "ch_axis": -1}},
    ),
}


@pytest.fixture
def check(forward: Forward) -> Callable[[QuantizedSam, Sam], list[OperatorCheck]]:
    return lambda sam, integer: verify_operators(sam, integer, lambda: forward(sam))


@pytest.mark.parametrize(("bits", "more"), SCHEMES.values(), ids=SCHEMES.keys())
def test_every_operator_agrees_with_the_simulation(
    quantize: Quantize,
    check: Callable[..., list[OperatorCheck]],
    bits: int,
    more: dict[str, object],
) -> None:
    quantized = quantize(bits, **more)
    checks = check(quantized, integer_model(quantized))
    attentions = 2 + 7 - ("float" in quantized.scheme.units.values())
    assert len(checks) == len(quantized_layers(quantized)) + attentions
    for found in checks:
        assert found.exact, found
        assert found.kept, found
    equal, outputs = sum(c.equal for c in checks), sum(c.outputs for c in checks)
    assert equal / outputs >= 0.9995


def test_after_reconstruction(
    quantize: Quantize, check: Callable[..., list[OperatorCheck]]
) -> None:
    quantized = quantize(4, 3)
    assert all(c.kept for c in check(quantized, integer_model(quantized)))


def test_a_wrong_weight_code_is_found(
    quantize: Quantize, check: Callable[..., list[OperatorCheck]]
) -> None:
    quantized = quantize(8)
    integer = integer_model(quantized)
    layer = integer.image_encoder.neck[2]
    layer.weight[3, 1, 1, 1] += layer.weight_quantizer.step[3]
    worst, *others = worst_first(check(quantized, integer))
    assert worst.name == "image_encoder.neck.2"
    assert not worst.exact
    assert not worst.kept
    assert all(c.kept for c in others)


def test_a_wrong_scale_is_found(
    quantize: Quantize, check: Callable[..., list[OperatorCheck]]
) -> None:
    quantized = quantize(8)
    integer = integer_model(quantized)
    attention = integer.get_submodule("mask_decoder.transformer.layers.1.self_attn")
    attention.q_proj.input_quantizer.scale *= 1.5
    attention.core.value_quantizer.scale *= 1.5
    broken = {c.name.rpartition("self_attn.")[2] for c in check(quantized, integer) if not c.kept}
    assert broken == {"q_proj", "core"}


def test_an_operator_that_is_not_reached_is_no_proof(quantize: Quantize) -> None:
    quantized = quantize()
    checks = verify_operators(quantized, integer_model(quantized), lambda: None)
    assert not any(c.kept for c in checks)
    assert all(c.outputs == 0 for c in checks)
    assert not any(m._forward_hooks for m in quantized.modules())


def test_outputs_are_compared_one_by_one() -> None:
    check = OperatorCheck("layer")
    check.add(torch.tensor([0.0, 1.0, 3.01]), torch.tensor([0.0, 1.0, 3.0]), 4)
    assert check.largest == pytest.approx(0.01 * (4 - 0.618) / 3, rel=1e-3)
    assert not check.exact
    check = OperatorCheck("layer")
    check.add(torch.tensor([1.0, 2, 3, 6]), torch.tensor([1.0, 2, 3, 4]), 4)
    assert (check.share, check.kept) == (0.75, False)
