"""The benchmarks run, on the smallest work they take; their figures are nobody's business here."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ptq4sam.errors import ConfigError
from ptq4sam.families import VARIANTS
from tests.families.efficientvit.conftest import TINY, TINY_VARIANT
from tests.tiny_runs import SMALL

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("script", "arguments", "rows"),
    [
        ("observers.py", ["--side", "16", "--bits", "3", "--keys", "64"], 2),
        ("quantized_forward.py", ["--model", SMALL, "--rounds", "1", "--device", "cpu"], 1),
        ("joint_units.py", ["--pictures", "1", "--steps", "3"], 2),
    ],
)
def test_a_table_comes_out(script: str, arguments: list[str], rows: int) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-rows - 1].startswith("|---")
    assert all(
        float(line.split("|")[-3 if rows == 1 else 2]) > 0
        for line in done.stdout.splitlines()[-rows:]
    )


def imported(name: str) -> Any:
    """The module of a benchmark."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    # Dataclasses look for their module.
    sys.modules[name] = benchmark
    spec.loader.exec_module(benchmark)
    return benchmark


def test_students_are_trained_once_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = imported("distillation")
    monkeypatch.setattr(benchmark, "keep_freed_memory", lambda: None)
    smallest = ["--steps", "2", "--batch", "1", "--pictures", "1", "--only", "students"]
    asked = [*smallest, "--work-dir", str(tmp_path)]
    assert benchmark.main(asked) == 0
    told = capsys.readouterr().out
    means = [float(line.split("|")[2]) for line in told.splitlines()[2:5]]
    assert means[0] > max(means[1:])
    assert f"less {benchmark.ALONE}: {means[1] - means[2]:+.1f}" in told.replace("-0.0", "+0.0")
    monkeypatch.setattr(benchmark, "distil", None)
    assert benchmark.main(asked) == 0
    assert capsys.readouterr().out == told
    with pytest.raises(ConfigError, match="begun with other steps"):
        benchmark.main([*asked, "--steps", "3"])


def test_uneven_channels_break_the_studys_int8_and_not_ours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = imported("efficientvit_ranges")
    monkeypatch.setitem(VARIANTS, "tiny_efficientvit", TINY_VARIANT)
    with torch.random.fork_rng(), torch.no_grad():
        even = benchmark.uneven_sam("tiny_efficientvit", 0.0, ["depthwise", "fused"])
        whole = benchmark.uneven_sam("tiny_efficientvit", 1.5, ["depthwise", "fused"])
        pixels = torch.randn(1, 3, TINY.image_size, TINY.image_size)
        folded = benchmark.folded(whole).image_encoder(pixels)
        torch.testing.assert_close(whole.image_encoder(pixels), folded, atol=1e-4, rtol=0)
        sizes = [
            sam.image_encoder.backbone.stages[3].op_list[1].main.depth_conv.conv.weight.abs()
            for sam in (even, whole)
        ]
        # What was drawn behind it differs, so that only sizes are compared.
        spread = [own.amax((1, 2, 3)).log().std() for own in sizes]
        assert spread[1] > spread[0] + 0.7
        found = benchmark.errors("tiny_efficientvit", 1.5, ["depthwise"])
    assert list(found) == [title for title, *_ in benchmark.ROWS]
    assert found["ours, W8A8"] < 0.5 * found["INT8 of the study"]
    assert found["ours, W8A8"] < found["INT8, each tensor once"]
    assert found["Mix-MBC-Neck of the study"] < found["INT8 of the study"]
    assert found["ours, W8A8"] < found["ours, W4A8"] < found["ours, W4A4"]
    assert capsys.readouterr().out.count("tiny_efficientvit, ") == len(benchmark.ROWS)
