"""The benchmarks run, on the smallest work they take; their figures are nobody's business here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("script", "arguments", "rows"),
    [
        ("observers.py", ["--side", "16", "--bits", "3", "--keys", "64"], 2),
        ("quantized_forward.py", ["--model", "vit_nano", "--rounds", "1", "--device", "cpu"], 1),
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
