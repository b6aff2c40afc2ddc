"""`ptq4sam quantize`: what it reports, and what it needs."""

from __future__ import annotations

import pytest

from ptq4sam.quantization.scheme import Scheme
from tests.tiny_runs import AP, QUICK, SCHEMES, Quantized, Tiny, refusal, run

pytest_plugins = ("tests.tiny_fixtures",)

# Nothing is written beside the repository.
pytestmark = pytest.mark.usefixtures("elsewhere")


def test_quantizing_reports_agreement_audit_and_scheme(quantized: Quantized) -> None:
    metrics = quantized.metrics
    assert metrics["quantized"] is True
    assert metrics["audit"]["passed"] is True
    assert (metrics["encoder"], metrics["encoder_quantized"]) == ("quantized", True)
    assert 0 <= metrics["agreement"] <= 1
    assert {*AP, "mean_iou"} <= metrics.keys()
    by_size = {f"mean_iou_{size}" for size in ("small", "medium", "large")}
    assert {*AP, "mean_iou", *by_size, "iou_error"} == metrics["float"].keys()
    assert {"calibration boxes", "quantize", "audit", "save", "evaluate"} <= set(metrics["phases"])
    scheme = Scheme.from_yaml(quantized.work_dir / "scheme.yaml")
    asked = Scheme.from_yaml(SCHEMES / "ptq4sam-s44.yaml").with_overrides(*QUICK, "calibrate=2")
    assert scheme == asked


def test_float_scores_beside_quantized_ones_are_those_of_a_float_run(
    quantized: Quantized, truth_metrics: dict[str, object]
) -> None:
    assert quantized.metrics["float"]["mean_iou"] == truth_metrics["mean_iou"]


def test_quantize_needs_a_scheme_and_a_name_for_its_output(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["quantize", *tiny.model(), "--work-dir", "w"]
    assert "scheme" in refusal(capsys, *asked, "--output", "q.safetensors")
    scheme = tiny.scheme("config44", "compat=published")
    assert "*.safetensors" in refusal(capsys, *asked, *scheme, "--output", "q.pth")
    assert "published" in refusal(capsys, *asked, *scheme, "--output", "q.safetensors")


def test_a_mistake_is_told_by_the_flag_that_was_written(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["quantize", *tiny.model(), *tiny.scheme("minmax44"), "--output", "q.safetensors"]
    told = refusal(capsys, *asked, "--calibration-size", "0", "--set", "methods=[pcc]")
    assert "asked for --calibration-size 0: use 1 or more" in told
    told = refusal(capsys, *asked, "--calibration-size", "4", "--set", "methods=[pccc]")
    assert " methods=[pccc]: methods: 'pccc' given" in told
    assert "calibrate" not in told


def test_the_last_line_names_the_model_and_what_to_do_with_it(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    scheme = tiny.scheme("minmax44")
    run(
        "quantize",
        *tiny.model(),
        *tiny.data(),
        *scheme,
        "--decoder-only",
        "--output",
        "q.safetensors",
    )
    told = capsys.readouterr().out.splitlines()[-1]
    assert told == (
        "written to q.safetensors; score it with ptq4sam evaluate --checkpoint q.safetensors"
    )
