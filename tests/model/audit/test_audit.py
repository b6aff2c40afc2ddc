from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ptq4sam.model.audit import AuditReport, audit, expected_activations
from ptq4sam.model.calibration import CalibrationItem
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.operators.base import quantized_layers
from ptq4sam.quantization.quantizers import Mode
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam
from tests.tiny_runs import SCHEMES

Forward = Callable[[Sam], tuple[Tensor, ...]]


@pytest.fixture
def quantized(quantize: Callable[..., QuantizedSam]) -> QuantizedSam:
    return quantize(4, 3)


@pytest.fixture
def run_audit(quantized: QuantizedSam, forward: Forward) -> Callable[[], AuditReport]:
    return lambda: audit(quantized, lambda: forward(quantized))


def problems(report: AuditReport) -> str:
    return "\n".join(report.lines())


def test_a_quantized_model_passes(
    quantized: QuantizedSam, run_audit: Callable[[], AuditReport]
) -> None:
    report = run_audit()
    assert report.passed, problems(report)
    assert report.layers == len(quantized_layers(quantized))
    assert report.activations == expected_activations(quantized)


@pytest.mark.parametrize("path", sorted(SCHEMES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_model_of_every_scheme_passes(
    sam: Sam, items: list[CalibrationItem], forward: Forward, path: Path
) -> None:
    scheme = Scheme.from_yaml(path).with_overrides("w_qconfig.observer=MinMaxObserver")
    if scheme.recon is not None:
        scheme = scheme.with_overrides("recon.iters=2")
    model = quantize_sam(sam, items[:2], scheme)
    report = audit(model, lambda: forward(model))
    assert report.passed, problems(report)


@pytest.mark.parametrize("bits", [2, 3, 8, 16])
@pytest.mark.parametrize("encoder", [True, False])
def test_a_model_of_any_bits_passes(
    sam: Sam,
    items: list[CalibrationItem],
    make_scheme: Callable[..., Scheme],
    forward: Forward,
    bits: int,
    encoder: bool,
) -> None:
    scheme = make_scheme(bits)
    model = quantize_sam(sam, items[:2], scheme, quantize_encoder=encoder)
    report = audit(model, lambda: forward(model))
    assert report.passed, problems(report)


def test_finds_a_weight_off_its_grid(
    quantized: QuantizedSam, run_audit: Callable[[], AuditReport]
) -> None:
    quantizer = quantized.image_encoder.blocks[0].attn.qkv.weight_quantizer
    quantizer.mode = Mode.FLOAT
    quantized.image_encoder.blocks[0].attn.qkv.weight.data.add_(0.001)
    assert "off the grid" in problems(run_audit())


def test_finds_a_weight_that_was_moved_after_freezing(
    quantized: QuantizedSam, run_audit: Callable[[], AuditReport]
) -> None:
    quantized.image_encoder.neck[0].weight.data[0, 0] += 1e-4
    assert "neck.0: " in problems(run_audit())


def test_finds_a_quantizer_that_still_drops(
    quantized: QuantizedSam, run_audit: Callable[[], AuditReport]
) -> None:
    quantized.image_encoder.blocks[1].mlp.lin1.input_quantizer.drop_probability = 0.5
    told = problems(run_audit())
    assert "drops quantization with probability 0.5" in told
    assert "of the input values that it multiplied are off the grid" in told
    assert "differ" in told


def test_finds_a_quantizer_that_is_off(
    quantized: QuantizedSam, run_audit: Callable[[], AuditReport]
) -> None:
    two_way = quantized.mask_decoder.transformer
    two_way.final_attn_token_to_image.core.key_quantizer.mode = Mode.FLOAT
    assert "final_attn_token_to_image.core.key_quantizer: is switched to float" in problems(
        run_audit()
    )


def test_finds_a_layer_that_was_missed(
    quantized: QuantizedSam, run_audit: Callable[[], AuditReport]
) -> None:
    mlp = quantized.image_encoder.blocks[0].mlp
    plain = nn.Linear(mlp.lin1.in_features, mlp.lin1.out_features)
    mlp.lin1 = plain
    assert "blocks.0.mlp.lin1: is listed as quantized but is a float operator" in problems(
        run_audit()
    )


def test_finds_a_layer_of_no_list(
    quantized: QuantizedSam, run_audit: Callable[[], AuditReport]
) -> None:
    quantized.image_encoder.extra = nn.Linear(2, 2)
    assert "image_encoder.extra: is in no list" in problems(run_audit())


def test_finds_an_activation_that_goes_around(
    quantized: QuantizedSam, run_audit: Callable[[], AuditReport]
) -> None:
    attention = quantized.mask_decoder.transformer.final_attn_token_to_image.core
    other = copy.deepcopy(attention.value_quantizer)
    other.mode = Mode.FLOAT
    attention.__dict__["value_quantizer"] = other  # shadows the registered module
    assert "no activation passed it" in problems(run_audit())


def test_published_compatibility_fails_the_audit_as_it_should(
    sam: Sam,
    items: list[CalibrationItem],
    make_scheme: Callable[..., Scheme],
    forward: Forward,
    caplog: pytest.LogCaptureFixture,
) -> None:
    scheme = make_scheme(4, steps=3, compat="published")
    with caplog.at_level("WARNING", logger="ptq4sam"):
        model = quantize_sam(sam, items[:2], scheme)
    assert "not those of a quantized model" in caplog.text
    told = problems(audit(model, lambda: forward(model)))
    assert "drops quantization" in told
    assert "of its weight is off the grid" in told
    assert "two passes on the same input differ" in told
    hard = model.image_encoder.blocks[0].attn
    assert (hard.qkv.weight_quantizer.rounding, hard.proj.weight_quantizer.rounding) == (
        "hard",
        "soft",
    )


def test_a_forward_that_is_not_reproducible_is_found(
    quantized: QuantizedSam, forward: Forward
) -> None:
    torch.manual_seed(0)

    def noisy() -> tuple[Tensor, ...]:
        return tuple(tensor + torch.rand(1) for tensor in forward(quantized))

    assert "two passes on the same input differ" in problems(audit(quantized, noisy))
