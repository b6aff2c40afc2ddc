"""Adaptive granularity and bimodal integration against golden vectors."""

from __future__ import annotations

import pytest
import torch

from ptq4sam.methods.adaptive_granularity import TAUS, AdaptiveGranularityQuantizer
from ptq4sam.methods.bimodal import channel_signs, is_bimodal
from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.quantizers import Mode
from ptq4sam.quantization.scheme import Methods
from tests.golden_cases import GoldenCase


@pytest.mark.golden("agq")
def test_golden_adaptive_granularity(golden_case: GoldenCase) -> None:
    case = golden_case
    quantizer = AdaptiveGranularityQuantizer(Grid(case.parameters["bit"]))
    quantizer.mode = Mode.OBSERVE
    for attention, value in zip(case["attn"], case["value"], strict=True):
        quantizer(attention, value)
    quantizer.mode = Mode.QUANTIZE
    # The error is a jagged function of the scale: another end point must not be worse.
    assert len(quantizer.tau_errors) == len(TAUS)
    for error, recorded in zip(quantizer.tau_errors, case["tau_errors"].tolist(), strict=True):
        assert error <= recorded * 1.001
    assert quantizer.tau_scales == pytest.approx(case["tau_scales"].tolist(), rel=1e-3)
    assert float(quantizer.tau) == float(case["tau"])
    assert quantizer.scale.item() == pytest.approx(float(case["scale"]), rel=1e-3)

    # What follows is checked at the recorded scale, where nothing is searched.
    quantizer.scale.data.copy_(case["scale"])
    y = quantizer(case["attn"][0])
    (y * case["dy"]).sum().backward()
    torch.testing.assert_close(y, case["y"], rtol=1e-5, atol=0)
    terms = float((case["dy"].abs() * y.detach()).sum() / quantizer.scale.detach())
    assert quantizer.scale.grad is not None
    assert quantizer.scale.grad.item() == pytest.approx(
        float(case["dscale"]), rel=1e-5, abs=1e-6 * terms
    )


@pytest.mark.golden("bimodal")
def test_golden_bimodal(golden_case: GoldenCase) -> None:
    case, settings = golden_case, golden_case.parameters
    methods = Methods(
        BIG=True,
        global_num=settings["global_num"],
        peak_distance=settings["peak_distance"],
        peak_height=settings["peak_height"],
    )
    recorded = bool(case["is_bimodal"])
    assert is_bimodal(case["x"], methods) == recorded
    if recorded:
        assert channel_signs(case["x"]).tolist() == case["sign"].tolist()
