"""A model whose heads have scales of their own, from its calibration to files and runtimes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ptq4sam.deploy import integer_model, open_exported
from ptq4sam.deploy.export import export
from ptq4sam.deploy.onnx import sums
from ptq4sam.deploy.onnx.encoder import encoder_graph
from ptq4sam.deploy.storage import load, save
from ptq4sam.deploy.targets import TARGETS, onnxruntime, openvino
from ptq4sam.model.audit import audit
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.operators.attention import QuantizedSoftmaxAttention
from ptq4sam.operators.base import quantized_layers
from ptq4sam.sam.model import Sam
from tests.deploy.runtime_graphs import (
    RUNTIMES,
    dialect,
    onnxruntime_operators,
    openvino_precisions,
    relative_error,
    run_graph,
)
from tests.deploy.test_onnx_models import formats, picture

Quantize = Callable[..., QuantizedSam]
Forward = Callable[[Sam], tuple[Tensor, ...]]
ROLES = ("query", "key", "value")


def per_head(*roles: str) -> dict[str, Any]:
    own = {"granularity": "per head", "observer": "MinMaxObserver"}
    return dict.fromkeys(roles, own)


SCHEMES: dict[str, tuple[int, dict[str, Any]]] = {
    "W8A8": (8, {**formats(8, True), "ptq4sam": {}, "slots": per_head(*ROLES)}),
    "W4A4": (4, {**formats(4, True), "ptq4sam": {}, "slots": per_head(*ROLES)}),
    "W8A8 with zero points": (8, {**formats(8, False), "ptq4sam": {}, "slots": per_head(*ROLES)}),
    "W6A6 with zero points": (6, {**formats(6, False), "ptq4sam": {}, "slots": per_head(*ROLES)}),
    "W8A8 queries": (8, {**formats(8, False), "ptq4sam": {}, "slots": per_head("query")}),
    "W4A4 PTQ4SAM values": (4, {"slots": per_head("value")}),
    "W6A6 PTQ4SAM keys": (6, {"slots": {"key@attention": per_head("key")["key"]}}),
}


def made(quantize: Quantize, name: str) -> QuantizedSam:
    """Scales that are learned have learned."""
    bits, content = SCHEMES[name]
    return quantize(bits, 2 if "PTQ4SAM" in name else 0, **content)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_is_honest_and_saved(
    scheme: str, quantize: Quantize, forward: Forward, tmp_path: Path
) -> None:
    model = made(quantize, scheme)
    report = audit(model, lambda: forward(model))
    assert report.passed, report.lines()
    given = {selector.split("@")[0] for selector in SCHEMES[scheme][1]["slots"]}
    cores = [x for x in model.modules() if isinstance(x, QuantizedSoftmaxAttention)]
    for core in cores:
        for role in ROLES:
            scale = core.quantizer(role).scale
            assert scale.shape == ((2,) if role in given else ())
            # Or heads would not be told apart below.
            assert len(scale.reshape(-1).unique()) == scale.numel()
    path = tmp_path / "model.safetensors"
    save(model, path)
    expected = forward(model)
    for same in (load(path), integer_model(model)):
        for found, wanted in zip(forward(same), expected, strict=True):
            assert torch.equal(found, wanted)


def test_one_scale_where_heads_should_have_some_is_found(
    quantize: Quantize, forward: Forward
) -> None:
    model = made(quantize, "W8A8 queries")
    query = model.image_encoder.blocks[0].attn.core.query_quantizer
    query.set_parameters(query.scale[0].clone(), query.zero_point[0].clone())
    problems = [found.problem for found in audit(model, lambda: forward(model)).findings]
    told = "of shape [] where the scheme says one for each head"
    assert problems == [f"has a scale {told}", f"has a zero_point {told}"]


@torch.no_grad()
@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_encoder_is_that_of_the_simulation(
    scheme: str, runtime: str, quantize: Quantize, tmp_path: Path
) -> None:
    with torch.enable_grad():
        model = made(quantize, scheme)
    expected = model.image_encoder(picture()).numpy()
    inputs = {"image": picture().numpy()}
    whole = dialect(runtime)
    # Windows in groups; heads one by one, in parts.
    cut = replace(whole, whole_bytes=0, piece_bytes=2 * 8 * 64 * 4)
    grouped = replace(whole, group_bytes=2 * 9 * 9 * 4)
    for form in (whole, cut, grouped):
        graph = encoder_graph(model, form)
        assert graph.exact
        (found,) = run_graph(graph, runtime, tmp_path, inputs)
        np.testing.assert_array_equal(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_products_of_digits_are_products(
    runtime: str, quantize: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As float32 needs them where the sums of an attention are too large for it."""
    model = made(quantize, "W8A8")
    expected = model.image_encoder(picture()).numpy()
    monkeypatch.setattr(sums, "EXACT", 1.0)
    graph = encoder_graph(model, dialect(runtime))
    (found,) = run_graph(graph, runtime, tmp_path, {"image": picture().numpy()})
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("runtime", TARGETS)
@pytest.mark.parametrize("scheme", ["W8A8", "W6A6 with zero points"])
def test_an_export_is_the_model(
    scheme: str, runtime: str, quantize: Quantize, forward: Forward, tmp_path: Path
) -> None:
    model = made(quantize, scheme)
    assert export(model, tmp_path, TARGETS[runtime].form).exact
    features, masks, ious = forward(model)
    found: Any = forward(open_exported(tmp_path, runtime))  # type: ignore[arg-type]
    assert torch.equal(found[0], features)
    for ours, expected in zip(found[1:], (masks, ious), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_products_run_on_integers(quantize: Quantize, tmp_path: Path) -> None:
    model = made(quantize, "W8A8")
    attentions = len(model.image_encoder.blocks)
    # Without the two convolutions; query, key and value are products of their own.
    layers = len(quantized_layers(model.image_encoder)) - 2 + 2 * attentions
    encoder_graph(model, onnxruntime.DIALECT).write(tmp_path / "unsigned.onnx", {})
    operators = onnxruntime_operators(tmp_path / "unsigned.onnx", tmp_path)
    assert operators["MatMulIntegerToFloat"] == layers + 2 * attentions
    assert operators["QLinearMatMul"] == 0
    encoder_graph(model, openvino.DIALECT).write(tmp_path / "signed.onnx", {})
    kinds = ("MatMul", "FullyConnected", "FullyConnectedQuantizedLegacy")
    found = openvino_precisions(tmp_path / "signed.onnx", kinds)
    # The neck's first convolution, of one place behind a transposition, is one of them.
    assert found["i8"] + found["u8"] == layers + 1 + 2 * attentions


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["W8A8", "W8A8 with zero points"])
def test_a_fast_export_is_near(scheme: str, quantize: Quantize, tmp_path: Path) -> None:
    model = made(quantize, scheme)
    expected = model.image_encoder(picture()).numpy()
    graph = encoder_graph(model, openvino.FAST)
    assert not graph.exact
    (found,) = run_graph(graph, "openvino", tmp_path, {"image": picture().numpy()})
    assert relative_error(found, expected) < 0.05
