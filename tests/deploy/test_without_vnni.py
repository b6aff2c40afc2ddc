"""Exact exports in OpenVINO once more, on this processor as if it had AVX2 and nothing newer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ptq4sam.deploy.products import exact_products
from ptq4sam.deploy.targets import TARGETS

SWITCH = "ONEDNN_MAX_CPU_ISA"
"""What oneDNN, which multiplies for OpenVINO and torch, may use; read when it is loaded."""
TESTS = (
    "test_without_vnni.py::test_int8_products_are_not_taken",
    "test_onnx_models.py::test_an_encoder_is_that_of_the_simulation",
    "test_exported.py::test_predictions_are_those_of_the_simulation",
    "test_products.py::test_sums_that_float32_would_round_are_cut[float32]",
)


def test_int8_products_are_not_taken() -> None:
    if os.environ.get(SWITCH) != "AVX2":
        pytest.skip(f"{SWITCH} is not AVX2")
    assert exact_products(TARGETS["openvino"]) == "float32"


def test_exports_are_exact_without_vnni() -> None:
    if SWITCH in os.environ or exact_products(TARGETS["openvino"]) != "int8":
        pytest.skip("the other tests run without VNNI")
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-k", "not onnxruntime", *(str(here / name) for name in TESTS)]
    done = subprocess.run(
        command,
        env=os.environ | {SWITCH: "AVX2"},
        cwd=here.parents[1],
        check=False,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout.splitlines()[-1], done.stdout[-3000:]
