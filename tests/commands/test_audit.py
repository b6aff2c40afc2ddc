"""`ptq4sam audit`."""

from __future__ import annotations

from pathlib import Path

import pytest

import ptq4sam
from ptq4sam.cli import main
from tests.tiny_runs import Quantized

pytest_plugins = ("tests.tiny_fixtures",)

# Nothing is written beside the repository.
pytestmark = pytest.mark.usefixtures("elsewhere")


def test_audit_of_a_file(quantized: Quantized, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(quantized.path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("audit passed")
    assert out.splitlines()[0].endswith("image encoder quantized")


def test_audit_of_a_file_with_a_defect(
    quantized: Quantized, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sam = ptq4sam.load(quantized.path)
    path = "image_encoder.blocks.1.mlp.lin2.input_quantizer"
    sam.get_submodule(path).scale *= 1000
    ptq4sam.save(sam, tmp_path / "defect.safetensors")
    capsys.readouterr()
    assert main(["audit", str(tmp_path / "defect.safetensors")]) == 1
    found = capsys.readouterr().out.splitlines()
    assert found[0].startswith("audit FAILED")
    assert any(line.strip().startswith(f"{path}: covers ") for line in found[1:])
