from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ptq4sam.deploy import open_exported
from ptq4sam.deploy.backends import encoding_seconds, open_backend
from ptq4sam.deploy.export import export
from ptq4sam.deploy.exported import ExportedSam
from ptq4sam.deploy.runtimes import RUNTIMES
from ptq4sam.deploy.storage import save
from ptq4sam.errors import CheckpointError, ConfigError, DependencyError, DeployError
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.sam.model import Sam
from ptq4sam.sam.predictor import Predictor

Quantize = Callable[..., QuantizedSam]

BOXES = [[5.0, 6, 40, 50], [20, 10, 60, 30], [1, 1, 70, 44]]
POINTS, LABELS = [[[10.0, 12], [50, 40]]] * 3, [[1, 0], [1, 1], [1, -1]]


@pytest.fixture
def picture() -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)


@pytest.fixture
def folder(quantize: Quantize, tmp_path: Path) -> tuple[QuantizedSam, Path]:
    """A model of 8 bits, and both of its exports."""
    model = quantize(8)
    for runtime_format in ("onnx", "openvino"):
        export(model, tmp_path / "exported", runtime_format)
    return model, tmp_path / "exported"


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_predictions_are_those_of_the_simulation(
    runtime: str, folder: tuple[QuantizedSam, Path], picture: Any
) -> None:
    model, path = folder
    simulated, deployed = Predictor(model), Predictor(open_exported(path, runtime))
    assert deployed.prompts_at_once == simulated.prompts_at_once
    expected, found = simulated.embed(picture), deployed.embed(picture)
    assert found.input_size == expected.input_size
    assert torch.equal(found.features, expected.features)
    masks = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    for prompts in (
        {"boxes": BOXES},
        {"points": POINTS, "labels": LABELS},
        {"boxes": BOXES, "points": POINTS, "labels": LABELS},
        {"masks": masks},
        {"boxes": BOXES, "masks": masks},
    ):
        for multimask in (False, True):
            # On one embedding: what is compared is the decoder.
            theirs = simulated.predict(**prompts, multimask=multimask, embedding=expected)
            ours = deployed.predict(**prompts, multimask=multimask, embedding=expected)
            # Masks pass float convolutions first.
            if "masks" in prompts:
                assert close(ours.low_res, theirs.low_res)
                continue
            # The same codes: only last bits of the float layers behind them differ.
            for mine, wanted in (
                (ours.low_res, theirs.low_res),
                (ours.iou_predictions, theirs.iou_predictions),
            ):
                torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Much closer than 8 bits are to the float model."""
    return ours.shape == theirs.shape and bool((ours - theirs).norm() < 0.02 * theirs.norm())


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_prompts_in_pieces(runtime: str, folder: tuple[QuantizedSam, Path], picture: Any) -> None:
    exported = open_exported(folder[1], runtime)
    whole, pieces = Predictor(exported), Predictor(exported, memory_budget=1)
    embedding = whole.embed(picture)
    expected = whole.predict(boxes=BOXES, embedding=embedding)
    found = pieces.predict(boxes=BOXES, embedding=embedding)
    assert close(found.low_res, expected.low_res)
    # Two results at once: neither may live in memory that the runtime uses again.
    assert torch.equal(expected.low_res, whole.predict(boxes=BOXES, embedding=embedding).low_res)


def test_a_fast_export_is_near_and_takes_bfloat16(
    folder: tuple[QuantizedSam, Path], picture: Any, tmp_path: Path
) -> None:
    model, whole = folder
    exact = Predictor(open_exported(whole, "openvino")).embed(picture).features
    assert torch.equal(exact, Predictor(model).embed(picture).features)
    assert not export(model, tmp_path, "openvino", fast=True).exact
    for precision in ("f32", "bf16"):
        fast = Predictor(open_exported(tmp_path, "openvino", precision)).embed(picture).features
        assert 0 < (fast - exact).norm() < 0.2 * exact.norm() or torch.equal(fast, exact)
    with pytest.raises(ConfigError, match="export --fast"):
        open_exported(whole, "openvino", "bf16")
    with pytest.raises(ConfigError, match="use openvino"):
        export(model, tmp_path, "onnx", fast=True)


def test_a_float_model_is_exported_too(sam: Sam, tmp_path: Path, picture: Any) -> None:
    manifest = export(sam, tmp_path, "onnx")
    assert (manifest.model, manifest.scheme) == ("tiny", None)
    found = Predictor(open_exported(tmp_path, "onnxruntime")).embed(picture).features
    expected = Predictor(sam).embed(picture).features
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_only_the_decoder_may_be_quantized(quantize: Quantize, tmp_path: Path) -> None:
    manifest = export(quantize(4, encoder=False), tmp_path, "onnx")
    assert manifest.encoder_quantized is False
    assert isinstance(open_exported(tmp_path, "onnxruntime"), ExportedSam)


def test_what_was_learned_is_exported(quantize: Quantize, tmp_path: Path, picture: Any) -> None:
    model = quantize(6, 2)
    export(model, tmp_path, "onnx")
    found = Predictor(open_exported(tmp_path, "onnxruntime")).embed(picture).features
    expected = Predictor(model).embed(picture).features
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_the_fastest_backend_is_taken(
    folder: tuple[QuantizedSam, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = folder
    for fast in RUNTIMES:
        seconds = dict.fromkeys(RUNTIMES, 1.0) | {fast: 0.5}
        monkeypatch.setattr(
            "ptq4sam.deploy.backends.encoding_seconds",
            lambda opened, seconds=seconds: seconds.get(getattr(opened, "runtime", ""), 1.0),
        )
        chosen = open_backend(path, "auto")
        assert isinstance(chosen, ExportedSam)
        assert chosen.runtime == fast
    save(model, path / "model.safetensors")
    assert open_backend(path / "model.safetensors", "auto").name == "tiny"
    assert encoding_seconds(model, rounds=1) > 0


def test_what_cannot_be_opened_is_named(
    folder: tuple[QuantizedSam, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = folder
    with pytest.raises(ConfigError, match="use onnxruntime or openvino"):
        open_exported(path, "tensorrt")
    with pytest.raises(ConfigError, match="OpenVINO has f32 and bf16"):
        open_exported(path, "onnxruntime", "bf16")
    with pytest.raises(CheckpointError, match="found none"):
        open_exported(tmp_path, "openvino")
    with pytest.raises(ConfigError, match="onnxruntime, openvino or auto"):
        open_backend(path, "tensorrt")
    with pytest.raises(CheckpointError, match="no quantized model, which torch-int8 needs"):
        open_backend(path / "encoder.onnx", "torch-int8")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DependencyError, match=r"pip install 'ptq4sam\[onnx\]'"):
        open_exported(path, "onnxruntime")


def test_damage_is_named(folder: tuple[QuantizedSam, Path]) -> None:
    _, path = folder
    encoder = path / "encoder.onnx"
    whole = encoder.read_bytes()
    for damaged in (whole[:-100], whole[:5000] + b"\0\0" + whole[5002:]):
        encoder.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"encoder.onnx is not the file that"):
            open_exported(path, "onnxruntime")
    encoder.unlink()
    with pytest.raises(CheckpointError, match=r"encoder.onnx is missing"):
        open_exported(path, "onnxruntime")
    (path / "encoder.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"encoder.bin is not the file that"):
        open_exported(path, "openvino")
    manifest = path / "onnx.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "format_version": 9}))
    with pytest.raises(CheckpointError, match="format version 9, this ptq4sam reads 1"):
        open_exported(path, "onnxruntime")
    manifest.write_text(json.dumps({**content, "unknown": 9}))
    with pytest.raises(CheckpointError, match=r"onnx.json is damaged"):
        open_exported(path, "onnxruntime")
    manifest.write_text("{")
    with pytest.raises(CheckpointError, match=r"onnx.json is damaged"):
        open_exported(path, "onnxruntime")


def test_what_cannot_be_exported_is_named(
    quantize: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantize(8)
    with pytest.raises(ConfigError, match="use onnx or openvino"):
        export(model, tmp_path, "tflite")  # type: ignore[arg-type]
    wide = quantize(
        8, a_qconfig={"quantizer": "FixedFakeQuantize", "observer": "MinMaxObserver", "bit": 10}
    )
    with pytest.raises(DeployError, match=r"image_encoder.blocks.0.attn.qkv.input has 10 bits"):
        export(wide, tmp_path, "onnx")
    # Nothing is left of an export that failed.
    assert list(tmp_path.iterdir()) == []
    published = quantize(8, 2, compat="published")
    with pytest.raises(DeployError, match="compat: published"):
        export(published, tmp_path, "onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(DependencyError, match=r"pip install 'ptq4sam\[onnx\]'"):
        export(model, tmp_path, "onnx")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(DependencyError, match=r"pip install 'ptq4sam\[openvino\]'"):
        export(model, tmp_path, "openvino")
