from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ptq4sam.deploy import integer_model, open_exported
from ptq4sam.deploy.backends import choose_backend, open_backend
from ptq4sam.deploy.container import is_quantized_file
from ptq4sam.deploy.export import export
from ptq4sam.deploy.exported import ExportedSam
from ptq4sam.deploy.storage import load, save
from ptq4sam.deploy.targets import FORMATS, TARGETS
from ptq4sam.deploy.targets.openvino import refused_writing
from ptq4sam.errors import (
    CheckpointError,
    ConfigError,
    DependencyError,
    DeployError,
    in_one_line,
)
from ptq4sam.families import build_sam
from ptq4sam.families.checkpoint import load_sam
from ptq4sam.locks import LOCK
from ptq4sam.model.calibration import CalibrationItem
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam
from ptq4sam.sam.predictor import Predictor
from tests.full_disks import FullDisk, full_disk

__all__ = ["full_disk"]

pytestmark = pytest.mark.usefixtures("shared_sessions")

Quantize = Callable[..., QuantizedSam]

BOXES = [[5.0, 6, 40, 50], [20, 10, 60, 30], [1, 1, 70, 44]]
POINTS, LABELS = [[[10.0, 12], [50, 40]]] * 3, [[1, 0], [1, 1], [1, -1]]


@pytest.fixture
def picture() -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)


@pytest.mark.parametrize("runtime", TARGETS)
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
    # Without prompts, which nobody but callers of `decode` can ask for, there is one mask.
    theirs_alone, ours_alone = (
        sam.decode((expected.features,), None, None, None, False)
        for sam in (model, open_exported(path, runtime))
    )
    assert ours_alone[0].shape == theirs_alone[0].shape
    torch.testing.assert_close(ours_alone[1], theirs_alone[1], rtol=1e-4, atol=1e-4)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Much closer than 8 bits are to the float model."""
    return ours.shape == theirs.shape and bool((ours - theirs).norm() < 0.02 * theirs.norm())


@pytest.mark.parametrize("runtime", TARGETS)
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
    with pytest.raises(ConfigError, match="write a fast export"):
        open_exported(whole, "openvino", "bf16")
    with pytest.raises(ConfigError, match="use openvino"):
        export(model, tmp_path, "onnx", fast=True)


def test_a_float_model_is_exported_too(sam: Sam, tmp_path: Path, picture: Any) -> None:
    manifest = export(sam, tmp_path, "onnx")
    assert (manifest.model, manifest.scheme) == ("tiny", None)
    found = Predictor(open_exported(tmp_path, "onnxruntime")).embed(picture).features
    expected = Predictor(sam).embed(picture).features
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["float", "quantized"])
@pytest.mark.parametrize("runtime_format", FORMATS)
def test_a_full_disk_names_the_folder(
    kind: str,
    runtime_format: str,
    sam: Sam,
    quantize: Quantize,
    tmp_path: Path,
    full_disk: FullDisk,
) -> None:
    model = sam if kind == "float" else quantize(8)
    with full_disk() as reason:
        with pytest.raises(OSError, match=r"device|large") as caught:
            export(model, tmp_path / "d", runtime_format)
        assert in_one_line(caught.value) == f"{tmp_path / 'd'}: {reason}"
        assert {path.name for path in (tmp_path / "d").iterdir()} <= {"full", LOCK}


def test_openvino_says_why_it_cannot_write(tmp_path: Path, full_disk: FullDisk) -> None:
    """The ONNX file may have had room where OpenVINO's two have none."""
    openvino = pytest.importorskip("openvino")
    operations = openvino.opset13
    read = operations.parameter([1, 64], np.float32)
    values = operations.constant(np.ones((64, 1024), np.float32))
    model = openvino.Model([operations.matmul(read, values, False, False)], [read])
    target = tmp_path / "d" / "a.xml"
    with full_disk() as reason:
        with pytest.raises(OSError, match=reason), refused_writing(target, 10**6):
            openvino.serialize(model, target)
        with pytest.raises(RuntimeError, match="another"), refused_writing(target, 10**6):
            raise RuntimeError("another problem")


def test_only_the_decoder_may_be_quantized(quantize: Quantize, tmp_path: Path) -> None:
    manifest = export(quantize(4, encoder=False), tmp_path, "onnx")
    assert manifest.encoder_quantized is False
    assert isinstance(open_exported(tmp_path, "onnxruntime"), ExportedSam)


def test_exact_is_not_claimed_behind_a_float_unit(quantize: Quantize, tmp_path: Path) -> None:
    """Its last bits are the runtime's own, and so are some of the codes behind it."""
    unit = "image_encoder.blocks.0.attn"
    manifest = export(quantize(8, units={unit: "float"}), tmp_path, "onnx")
    assert not manifest.exact
    # Sums of codes are whole all the same, and must not saturate.
    assert manifest.products is not None
    assert open_exported(tmp_path, "onnxruntime").products == manifest.products
    # A float unit that nothing quantized follows takes nothing away.
    last = "mask_decoder.transformer.final_attn_token_to_image"
    assert export(quantize(8, units={last: "float"}), tmp_path, "onnx").exact


def test_what_was_learned_is_exported(quantize: Quantize, tmp_path: Path, picture: Any) -> None:
    model = quantize(6, 2)
    export(model, tmp_path, "onnx")
    found = Predictor(open_exported(tmp_path, "onnxruntime")).embed(picture).features
    expected = Predictor(model).embed(picture).features
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_an_exported_model_is_recognized(
    folder: tuple[QuantizedSam, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, path = folder
    with caplog.at_level(logging.INFO, "ptq4sam"):
        assert choose_backend(path, None) == (path, "onnxruntime")
    assert f"{path} is an exported model: backend onnxruntime" in caplog.text
    assert "it has onnx and openvino" in caplog.text
    for name, runtime in (
        ("encoder.onnx", "onnxruntime"),
        ("onnx.json", "onnxruntime"),
        ("encoder.xml", "openvino"),
        ("decoder.bin", "openvino"),
    ):
        assert choose_backend(path / name, None) == (path, runtime)
        assert choose_backend(path / name, "auto") == (path, "auto")
    with pytest.raises(ConfigError, match="which torch does not run"):
        choose_backend(path, "torch")
    monkeypatch.setattr("ptq4sam.deploy.backends.find_spec", lambda name: name == "openvino")
    assert choose_backend(path, None) == (path, "openvino")
    (path / "onnx.json").unlink()
    assert choose_backend(path, None) == (path, "openvino")
    # What is no export is left to whoever reads it.
    (path / "weights.pth").write_bytes(b"")
    for other in (path / "weights.pth", path / "encoder.onnx", path / "nowhere.xml", path.parent):
        assert choose_backend(other, None) == (other, "torch")
        assert choose_backend(other, "openvino") == (other, "openvino")
    assert choose_backend(None, None) == (None, "torch")


def test_size_and_normalization_go_with_the_model(
    make_scheme: Callable[..., Scheme], tmp_path: Path
) -> None:
    """A SAM that was fine-tuned for other pictures stays one in files and exports."""
    torch.manual_seed(0)
    built = build_sam("tiny", 40)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.15) if parameter.dim() > 1 else None
    constants = {"pixel_mean": torch.full((3,), 100.0), "pixel_std": torch.full((3,), 50.0)}
    torch.save({**built.state_dict(), **constants}, tmp_path / "tuned.pth")
    sam = load_sam("tiny", tmp_path / "tuned.pth")
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(1, 3, 40, 40, generator=generator)
    items = [CalibrationItem(pixels, torch.tensor([[4.0, 4, 30, 30]]))]
    scheme = make_scheme(8)
    quantized = quantize_sam(sam, items, scheme)
    # By a name that says nothing.
    save(quantized, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").rename(tmp_path / "model.pth")
    assert is_quantized_file(tmp_path / "model.pth")
    export(quantized, tmp_path / "exported", "onnx")
    image = np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)
    simulated = Predictor(quantized)
    embedding = simulated.embed(image)
    masks = simulated.predict(boxes=BOXES, embedding=embedding).low_res
    assert embedding.input_size == (24, 40)
    assert masks.shape[-2:] == (20, 20)
    for other in (
        load(tmp_path / "model.pth"),
        integer_model(quantized),
        open_exported(tmp_path / "exported", "onnxruntime"),
    ):
        found = Predictor(other)
        assert torch.equal(found.embed(image).features, embedding.features)
        ours = found.predict(boxes=BOXES, embedding=embedding).low_res
        torch.testing.assert_close(ours, masks, rtol=1e-4, atol=1e-4)
    exported = json.loads((tmp_path / "exported" / "onnx.json").read_text())
    assert (exported["image_size"], exported["pixel_mean"]) == (40, [100.0] * 3)


def test_what_cannot_be_opened_is_named(
    folder: tuple[QuantizedSam, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = folder
    with pytest.raises(ConfigError, match="use onnxruntime or openvino"):
        open_exported(path, "tensorrt")
    with pytest.raises(ConfigError, match="openvino has f32 and bf16"):
        open_exported(path, "onnxruntime", "bf16")
    with pytest.raises(CheckpointError, match="found none"):
        open_exported(tmp_path, "openvino")
    with pytest.raises(ConfigError, match="onnxruntime, openvino or auto"):
        open_backend(path, "tensorrt")
    with pytest.raises(CheckpointError, match="no quantized model, which integer needs"):
        open_backend(path / "encoder.onnx", "integer")
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
    # Nothing but the lock is left of an export that failed.
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    published = quantize(8, 2, compat="published")
    with pytest.raises(DeployError, match="compat: published"):
        export(published, tmp_path, "onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(DependencyError, match=r"pip install 'ptq4sam\[onnx\]'"):
        export(model, tmp_path, "onnx")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(DependencyError, match=r"pip install 'ptq4sam\[openvino\]'"):
        export(model, tmp_path, "openvino")


def test_pictures_resized_to_a_square_are_refused(tmp_path: Path) -> None:
    model = build_sam("vit_nano")
    model.geometry = dataclasses.replace(model.geometry, resizing="square")
    with pytest.raises(DeployError, match=r"resized to a square: .* by the longest side"):
        export(model, tmp_path, "onnx")
