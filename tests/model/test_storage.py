from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ptq4sam.errors import CheckpointError, ConfigError
from ptq4sam.model.audit import audit
from ptq4sam.model.calibration import CalibrationItem
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.model.storage import FORMAT, is_quantized_file, load, save
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam

Forward = Callable[[Sam], tuple[Tensor, ...]]
MakeScheme = Callable[..., Scheme]


@pytest.fixture
def saved(sam: Sam, items: list[CalibrationItem], make_scheme: MakeScheme, tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save(quantize_sam(sam, items[:2], make_scheme(4, steps=3)), path)
    return path


def rewrite(path: Path, **changes: object) -> None:
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()[FORMAT])
    description.update(changes)
    save_file(load_file(path), path, metadata={FORMAT: json.dumps(description)})


@pytest.mark.parametrize("encoder", [True, False])
def test_load_gives_the_same_bits(
    sam: Sam,
    items: list[CalibrationItem],
    make_scheme: MakeScheme,
    forward: Forward,
    tmp_path: Path,
    encoder: bool,
) -> None:
    scheme = make_scheme(4, steps=3)
    quantized = quantize_sam(sam, items[:2], scheme, quantize_encoder=encoder)
    save(quantized, tmp_path / "deep" / "model.safetensors")
    loaded = load(tmp_path / "deep" / "model.safetensors")
    assert loaded.scheme == scheme
    assert loaded.encoder_quantized is encoder
    assert loaded.folded == quantized.folded
    assert all(map(torch.equal, forward(loaded), forward(quantized)))
    assert audit(loaded, lambda: forward(loaded)).passed
    assert not list(tmp_path.rglob("*.tmp"))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load(tmp_path / "nothing.safetensors")


def test_truncated_file(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is damaged"):
        load(saved)


def test_float_weights_are_no_quantized_model(sam: Sam, tmp_path: Path) -> None:
    path = tmp_path / "float.safetensors"
    save_file(sam.state_dict(), path)
    assert not is_quantized_file(path)
    with pytest.raises(CheckpointError, match="is not a quantized model"):
        load(path)


def test_newer_format_version(saved: Path) -> None:
    rewrite(saved, format_version=99)
    with pytest.raises(CheckpointError, match="format version 99"):
        load(saved)


def test_tensors_of_another_model(saved: Path) -> None:
    rewrite(saved, model="vit_nano")
    with pytest.raises(CheckpointError, match="does not hold the model it names"):
        load(saved)


def test_compat_published_is_not_saved(
    sam: Sam, items: list[CalibrationItem], make_scheme: MakeScheme, tmp_path: Path
) -> None:
    model = quantize_sam(sam, items[:2], make_scheme(4, steps=2, compat="published"))
    with pytest.raises(ConfigError, match="compat: published"):
        save(model, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())
