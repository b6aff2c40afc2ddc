"""A model whose weights have groups, from its calibration to files and runtimes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ptq4sam.deploy import integer_model, open_exported
from ptq4sam.deploy.cost import storage
from ptq4sam.deploy.export import export
from ptq4sam.deploy.storage import load, save
from ptq4sam.deploy.targets import TARGETS
from ptq4sam.model.audit import audit
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.operators.base import quantized_layers
from ptq4sam.sam.predictor import Predictor

Forward = Callable[[QuantizedSam], Any]

WEIGHTS = {
    "quantizer": "AdaRoundFakeQuantize",
    "observer": "MinMaxObserver",
    "bit": 4,
    "granularity": "per group",
    "group_size": 8,
}


@pytest.fixture
def model(quantize: Callable[..., QuantizedSam]) -> QuantizedSam:
    return quantize(4, 2, w_qconfig=WEIGHTS)


def test_it_is_honest_and_saved(model: QuantizedSam, forward: Forward, tmp_path: Path) -> None:
    report = audit(model, lambda: forward(model))
    assert report.passed, report.lines()
    for _, layer in quantized_layers(model):
        channels, inputs = layer.weight.shape[:2]
        assert layer.weight_quantizer.scale.shape == (channels, max(1, inputs // 8))
    path = tmp_path / "model.safetensors"
    save(model, path)
    loaded, expected = load(path), forward(model)
    for same in (loaded, integer_model(model)):
        for found, wanted in zip(forward(same), expected, strict=True):
            assert torch.equal(found, wanted)
    sizes = {name: size for name, _, size in storage(model)}
    tensors = load_file(path)
    for name, _ in quantized_layers(model):
        parts = ("weight.codes", *(f"weight_quantizer.{x}" for x in ("scale", "zero_point")))
        held = [tensors[f"{name}.{part}"] for part in (*parts, "weight_quantizer.octaves")]
        assert sum(tensor.nbytes for tensor in held) == sizes[f"{name}.weight"]


@pytest.mark.parametrize("runtime", TARGETS)
def test_exports_give_what_it_gives(model: QuantizedSam, runtime: str, tmp_path: Path) -> None:
    assert export(model, tmp_path / "exported", TARGETS[runtime].form).exact
    picture: Any = np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)
    found = Predictor(open_exported(tmp_path / "exported", runtime)).embed(picture)
    assert torch.equal(found.features, Predictor(model).embed(picture).features)


def test_slots_of_more_bits_have_no_groups_and_are_exported(
    quantize: Callable[..., QuantizedSam], tmp_path: Path
) -> None:
    """Steps of groups at 8 bits with zero points would be no bytes."""
    given = quantize(4, w_qconfig=WEIGHTS, slots={"weight@decoder": {"bit": 8}})
    shapes = {
        (
            name.startswith("mask"),
            layer.weight_quantizer.scale.dim(),
            layer.weight_quantizer.grid.bits,
        )
        for name, layer in quantized_layers(given)
    }
    assert shapes == {(False, 2, 4), (True, 1, 8)}
    assert export(given, tmp_path, "onnx").exact
