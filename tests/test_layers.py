"""The arrows between folders (pyproject.toml, tool.importlinter) hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# In a process of its own: the tool sets up logging for all.
LINT = "import sys; from importlinter.cli import lint_imports as run; sys.exit(run(no_cache=True))"


def test_imports_point_down() -> None:
    pytest.importorskip("importlinter", reason="the extra dev is not installed")
    done = subprocess.run(
        [sys.executable, "-c", LINT], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kept, 0 broken" in done.stdout
