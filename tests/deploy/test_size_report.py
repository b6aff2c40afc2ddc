"""The files of a SAM-B with random weights: sizes, and the same weights after loading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ptq4sam.cli import main
from ptq4sam.deploy.size_report import size_report
from ptq4sam.deploy.storage import load, save
from ptq4sam.families import build_sam
from ptq4sam.model.insertion import QuantizedSam, insert_quantizers
from ptq4sam.operators.base import observe_weights, put_weights_on_grid
from ptq4sam.quantization.modes import quantizers
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam

REPOSITORY = Path(__file__).resolve().parents[2]
LIMITS = {4: 0.15, 6: 0.21, 8: 0.27}
"""Of float32, by bits of the weights: with schemes as they are, no option set."""


@pytest.fixture(scope="module")
def sam_b() -> Sam:
    sam = build_sam("vit_b")
    for name, parameter in sam.image_encoder.named_parameters():
        if "_pos" in name or "pos_" in name:
            torch.nn.init.normal_(parameter, std=0.02)  # zeros at first, which need no float32
    return sam


@pytest.fixture(scope="module")
def float_bytes(sam_b: Sam, tmp_path_factory: pytest.TempPathFactory) -> int:
    path = tmp_path_factory.mktemp("float") / "float.safetensors"
    save_file(sam_b.state_dict(), path)
    size = path.stat().st_size
    path.unlink()
    return size


def quantized(sam: Sam, bits: int, *more: str) -> QuantizedSam:
    """Weights on their grids; activations have scales that no picture gave."""
    scheme = Scheme.from_yaml(REPOSITORY / "exp" / "config44.yaml").with_overrides(
        f"w_qconfig.bit={bits}",
        f"a_qconfig.bit={bits}",
        "w_qconfig.observer=MinMaxObserver",
        *more,
    )
    model = insert_quantizers(sam, scheme)
    for _, quantizer in quantizers(model):
        quantizer._set_parameters(torch.tensor(0.017), torch.zeros(()))
    observe_weights(model)
    put_weights_on_grid(model)
    return model


@pytest.mark.parametrize("bits", LIMITS)
def test_sam_b_keeps_its_promise(sam_b: Sam, float_bytes: int, tmp_path: Path, bits: int) -> None:
    path = tmp_path / "model.safetensors"
    model = quantized(sam_b, bits)
    save(model, path)
    assert path.stat().st_size <= LIMITS[bits] * float_bytes
    report = size_report(path)
    assert report.size == path.stat().st_size == sum(part.size for part in report.parts)
    assert report.float_size == pytest.approx(float_bytes, rel=0.001)
    if bits == 4:
        loaded = load(path).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


def test_report_names_the_parts(sam_b: Sam, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(quantized(sam_b, 6, "float_weights=float32"), path)
    report = size_report(path)
    parts = {part.name: part for part in report.parts}
    encoder = parts["image encoder"]
    assert encoder.kind == "6 bits"
    assert encoder.size == encoder.values * 6 // 8
    assert encoder.float_size == 4 * encoder.values
    embedding = parts["position embedding"]
    assert embedding.size == embedding.float_size == 4 * 64 * 64 * 768
    lines = report.lines()
    assert lines[-2].startswith("total")
    assert f"{report.share:.2%}" in lines[-2]
    assert lines[-1].startswith("share: ")
    assert f"{report.float_size / 1e6:.2f} MB" in lines[-1]
    assert f"{report.share:.1%}" in report.summary()


def test_a_flipped_bit_is_found_before_anything_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.safetensors"
    save(quantized(build_sam("vit_nano"), 4), path)
    assert main(["size", str(path)]) == 0
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    capsys.readouterr()
    assert main(["size", str(path)]) == 2
    told = capsys.readouterr()
    assert "does not have its checksum" in " ".join(told.err.split())
    assert not told.out
