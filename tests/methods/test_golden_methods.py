"""Adaptive granularity and bimodal integration against golden vectors."""

from __future__ import annotations

import pytest
import torch

from ptq4sam.methods.adaptive_granularity import TAUS, AdaptiveGranularityQuantizer
from ptq4sam.methods.bimodal import channel_signs, is_bimodal
from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.published import Methods
from ptq4sam.quantization.quantizers import Mode
from tests.golden_cases import NOT_WORSE, SEARCHED, GoldenCase


@pytest.mark.golden("agq")
def test_golden_adaptive_granularity(golden_case: GoldenCase) -> None:
    case = golden_case
    quantizer = AdaptiveGranularityQuantizer(Grid(case.parameters["bit"]))
    quantizer.mode = Mode.OBSERVE
    for attention, value in zip(case["attn"], case["value"], strict=True):
        quantizer(attention, value)
    quantizer.mode = Mode.QUANTIZE
    # The error is a jagged function of the scale: the same end point, or one that is as good.
    recorded = case["tau_errors"].tolist()
    ends = zip(quantizer.tau_scales, case["tau_scales"].tolist(), strict=True)
    for found, expected, (scale, known) in zip(quantizer.tau_errors, recorded, ends, strict=True):
        assert scale == pytest.approx(known, rel=SEARCHED) or found <= NOT_WORSE * expected
    # Of two granularities that are as good either may win.
    best = TAUS.index(int(quantizer.tau))
    assert quantizer.tau == case["tau"] or recorded[best] <= NOT_WORSE * min(recorded)
    assert quantizer.scale.item() == pytest.approx(quantizer.tau_scales[best])

    # What follows is checked at the recorded scale, where nothing is searched.
    quantizer.scale.data.copy_(case["scale"])
    quantizer.tau.copy_(case["tau"])
    y = quantizer(case["attn"][0])
    (y * case["dy"]).sum().backward()
    torch.testing.assert_close(y, case["y"], rtol=1e-5, atol=0)
    terms = float((case["dy"].abs() * y.detach()).sum() / quantizer.scale.detach())
    assert quantizer.scale.grad is not None
    assert quantizer.scale.grad.item() == pytest.approx(
        float(case["dscale"]), rel=1e-5, abs=1e-6 * terms
    )


@pytest.mark.golden("agq")
def test_a_search_on_a_grid_is_never_above_the_recorded_error(golden_case: GoldenCase) -> None:
    case = golden_case
    quantizer = AdaptiveGranularityQuantizer(Grid(case.parameters["bit"]), search="grid")
    quantizer.mode = Mode.OBSERVE
    for attention, value in zip(case["attn"], case["value"], strict=True):
        quantizer(attention, value)
    for found, recorded in zip(quantizer.tau_errors, case["tau_errors"].tolist(), strict=True):
        assert found <= recorded * (1 + 1e-5)


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
