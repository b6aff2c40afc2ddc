"""`ptq4sam verify` and `size`, and what `audit` says of a damaged file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ptq4sam.cli import main
from ptq4sam.deploy.verify import OperatorCheck
from ptq4sam.runs import verifying
from ptq4sam.runs.verifying import Verification
from tests.tiny_runs import Quantized, Tiny

pytest_plugins = ("tests.tiny_fixtures",)

Output = pytest.CaptureFixture[str]


def test_verify_on_generated_scenes(quantized: Quantized, capsys: Output) -> None:
    assert main(["verify", str(quantized.path), "--limit", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("verify passed: 51 operators on 1 pictures, sums of 51 equal, ")
    assert all(line.endswith("equal") and line.startswith("  ") for line in lines[3:11])
    agreement = re.match(
        r"masks of integer model and simulation: mean IoU ([0-9.]+) of 0.99", lines[-2]
    )
    assert agreement is not None
    assert float(agreement[1]) == 1
    assert "noise on its input" in lines[-1]


def test_verify_on_pictures_of_a_folder(quantized: Quantized, tiny: Tiny, capsys: Output) -> None:
    images = ["--images", str(tiny.images()), "--limit", "1"]
    assert main(["verify", str(quantized.path), *images]) == 0
    assert "(4 masks)" in capsys.readouterr().out
    assert main(["verify", str(quantized.path), "--images", str(tiny.folder / "none")]) == 2
    assert main(["verify", str(quantized.path), "--limit", "0"]) == 2


def test_a_broken_promise_is_the_exit_status(
    quantized: Quantized, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = OperatorCheck("good", outputs=10_000, equal=9_999, largest=1.0)
    bad = OperatorCheck("bad", outputs=10_000, equal=9_989, largest=1.0)
    found = Verification([good, bad], 1, [0.9], [0.8])
    monkeypatch.setattr(verifying, "verify_model", lambda *_: found)
    assert main(["verify", str(quantized.path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("verify FAILED in 1 operators")
    assert lines[3].split() == ["!", "bad", "99.8900%", "1.0000", "equal"]
    assert lines[4].split()[0] == "good"


def test_masks_below_the_goal_are_named() -> None:
    good = OperatorCheck("good", outputs=10_000, equal=10_000)
    found = Verification([good], 1, [0.98, 0.99], [0.98])
    assert found.passed
    assert "although every operator is right" in found.lines()[-2]
    assert "goal" not in "".join(Verification([good], 1, [0.99, 1.0], [0.98]).lines())


def test_size_by_part(quantized: Quantized, capsys: Output) -> None:
    assert main(["size", str(quantized.path)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert ["image", "encoder", "4", "bits"] in [line.split()[:4] for line in table[2:]]
    assert sum(line.startswith("total") for line in table) == 1
    assert "float32" in table[-1]  # what a share is of


def test_quantize_says_how_large_the_file_is(quantized: Quantized, tiny: Tiny) -> None:
    weights = sum(tensor.numel() for tensor in load_file(tiny.checkpoint).values())
    log = (quantized.work_dir / "run.log").read_text()
    assert f"of the {4 * weights / 1e6:.2f} MB" in log
    assert "MB of its float32 weights" in log


def test_audit_sees_a_flipped_byte(quantized: Quantized, tmp_path: Path, capsys: Output) -> None:
    content = bytearray(quantized.path.read_bytes())
    # Behind the description, among the tensors.
    content[len(content) * 9 // 10] ^= 0x10
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(content)
    assert main(["audit", str(damaged)]) == 2
    assert "does not have its checksum" in capsys.readouterr().err
