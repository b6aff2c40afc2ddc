"""The runtime is asked whether its products of codes are exact on this processor."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from ptq4sam.deploy import products
from ptq4sam.deploy.backends import open_backend
from ptq4sam.deploy.export import export
from ptq4sam.deploy.exported import open_exported
from ptq4sam.deploy.onnx.graph import Graph
from ptq4sam.deploy.onnx.layers import linear
from ptq4sam.deploy.products import advice, exact_products, multiplies_exactly
from ptq4sam.deploy.targets import TARGETS
from ptq4sam.errors import ConfigError, DeployError
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.quantization.grid import Grid
from ptq4sam.sam.model import Sam
from tests.deploy.runtime_graphs import dialect, given, run_graph
from tests.deploy.test_onnx_values import quantized_linear

pytestmark = pytest.mark.usefixtures("shared_sessions")

Quantize = Callable[..., QuantizedSam]
Array = NDArray[Any]


def saturated(a: Array, b: Array) -> Array:
    """The product of [..., n, k] and [..., k, m], whose terms are added in pairs of 16 bits."""
    terms = a[..., :, None, :].astype(np.int64) * np.swapaxes(b, -1, -2)[..., None, :, :]
    pairs = terms.reshape(*terms.shape[:-1], -1, 2).sum(-1)
    return pairs.clip(-(2**15), 2**15 - 1).sum(-1).astype(np.float32)


class MatMul(OpRun):  # type: ignore[misc]
    """ONNX's operator on a processor without VNNI."""

    op_domain = ""

    def _run(self, a: Array, b: Array) -> tuple[Array]:
        return (saturated(a, b),)


def in_reference(*replaced: type[OpRun]) -> products.Run:
    """ONNX's own evaluator as the runtime."""

    def run(path: Path, outputs: Sequence[str], inputs: Any) -> list[Array]:
        evaluator = ReferenceEvaluator(onnx.load(path), new_ops=list(replaced))
        return list(evaluator.run(list(outputs), dict(inputs)))

    return run


@pytest.mark.parametrize("runtime", TARGETS)
def test_an_honest_runtime_passes_and_one_that_saturates_is_noticed(runtime: str) -> None:
    state = torch.get_rng_state()
    assert multiplies_exactly(in_reference(), dialect(runtime))
    assert torch.equal(torch.get_rng_state(), state)
    assert not multiplies_exactly(in_reference(MatMul), dialect(runtime))


@pytest.mark.parametrize("runtime", TARGETS)
def test_something_is_exact_on_every_processor(runtime: str) -> None:
    target = TARGETS[runtime]
    assert exact_products(target) in target.products
    assert (advice(target) is None) == (exact_products(target) == "int8")


def exact_are(monkeypatch: pytest.MonkeyPatch, *exact: str) -> None:
    """A processor on which these products alone are exact."""
    monkeypatch.setattr(products, "_is_exact", lambda runtime, form: form in exact)


@pytest.mark.parametrize("form", TARGETS["openvino"].products)
@pytest.mark.parametrize("symmetric", [False, True])
def test_an_export_is_exact_in_each_form(
    form: str, symmetric: bool, quantize: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of one form, and files of int8 that are opened where these saturate."""
    if form == "int8" and exact_products(TARGETS["openvino"]) != "int8":
        pytest.skip("int8 products saturate on this processor")
    slots = {
        slot: {
            "quantizer": "FixedFakeQuantize",
            "observer": "MinMaxObserver",
            "bit": 8,
            "symmetric": symmetric,
            "ch_axis": axis,
        }
        for slot, axis in (("a_qconfig", -1), ("w_qconfig", 0))
    }
    model = quantize(8, **slots, ptq4sam={})
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        features = model.embed(pixels)
        low_res, _ = model.decode(features, None, torch.tensor([[4.0, 6, 40, 50]]), None, True)
    for held in {form, "int8"}:
        manifest = export(model, tmp_path / held, "openvino", products=held)  # type: ignore[arg-type]
        assert manifest.products == held
        exact_are(monkeypatch, form)
        opened = open_exported(tmp_path / held, "openvino")
        assert opened.products == form
        assert torch.equal(opened.embed(pixels)[0], features[0])
        found, _ = opened.decode(features, None, torch.tensor([[4.0, 6, 40, 50]]), None, True)
        torch.testing.assert_close(found, low_res, rtol=1e-5, atol=1e-5)


def test_the_form_follows_the_processor(
    quantize: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantize(8)
    exact_are(monkeypatch, "int16", "float32")
    for target in TARGETS.values():
        manifest, last = export(model, tmp_path, target.form), target.products[-1]  # type: ignore[arg-type]
        assert manifest.products == last
        assert json.loads((tmp_path / f"{target.form}.json").read_text())["products"] == last
        told = advice(target)
        assert told is not None
        assert "\n" not in told
        assert last in told
    # Elsewhere it is asked again: files of float32 products have no others.
    exact_are(monkeypatch, "int8", "int16", "float32")
    assert open_exported(tmp_path, "onnxruntime").products == "int8"
    assert open_exported(tmp_path, "openvino").products == "float32"


@pytest.mark.parametrize("runtime", TARGETS)
def test_a_runtime_that_is_never_exact_is_refused(
    runtime: str, quantize: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact_are(monkeypatch)
    # Another machine may be exact.
    assert export(quantize(8), tmp_path, TARGETS[runtime].form).products is None  # type: ignore[arg-type]
    with pytest.raises(DeployError, match=f"{runtime} multiplies codes inexactly") as refused:
        open_exported(tmp_path, runtime)
    assert "\n" not in str(refused.value)
    assert "fast export" in str(refused.value)


def test_a_fast_or_float_export_promises_nothing(
    quantize: Quantize, sam: Sam, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact_are(monkeypatch)
    for model, fast in ((quantize(8), True), (sam, False)):
        assert export(model, tmp_path, "openvino", fast=fast).products is None
        assert open_exported(tmp_path, "openvino").products is None


def test_auto_tells_what_int8_is_worth_here(
    quantize: Quantize,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    exact_are(monkeypatch, "int16", "float32")
    caplog.set_level("INFO", "ptq4sam")
    export(quantize(8), tmp_path, "openvino")
    assert caplog.text.count("float32 export is as fast") == 1
    caplog.clear()
    open_backend(tmp_path, "auto")
    assert caplog.text.count("float32 export is as fast") == 1
    assert "openvino multiplies codes in float32: exact on this processor" in caplog.text


def test_products_that_a_format_has_not_are_refused(quantize: Quantize, tmp_path: Path) -> None:
    model = quantize(4)
    for form, fast, wanted in (
        ("onnx", False, "float32"),
        ("openvino", True, "float32"),
        ("openvino", False, "int4"),
    ):
        with pytest.raises(ConfigError, match="have int8 or float32"):
            export(model, tmp_path, form, fast=fast, products=wanted)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("products_of", TARGETS["openvino"].products)
def test_sums_that_float32_would_round_are_cut(
    products_of: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if products_of not in (exact_products(TARGETS["openvino"]), "float32"):
        pytest.skip("int8 products saturate on this processor")
    monkeypatch.setattr("tests.deploy.runtime_graphs.exact_products", lambda runtime: products_of)
    torch.manual_seed(0)
    x = torch.rand(1, 30, 1500)
    layer = quantized_linear(Grid(8), Grid(8), x)
    # Weights and inputs at the ends of their grids: 1500 * 255 * 255 is six times 2^24.
    layer.weight.copy_(layer.weight_quantizer(torch.sign(layer.weight) + layer.weight))
    graph = Graph("linear", dialect("openvino"))
    graph.output("y", linear(graph, layer, given(graph, x)).name, np.float32, [1, 30, 24])
    found = run_graph(graph, "openvino", tmp_path, {"x": x.numpy()})[0]
    with torch.no_grad():
        np.testing.assert_array_equal(found, layer(x).numpy())
