"""The checks for the day when there is a GPU: here in small, on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import gpu_check
import pytest
import torch
from gpu_check import CHECKS, LINES, TABLE, Check, Finding, install, run_apart, table
from gpu_checks_numbers import awkward, unequal

TOOL = Path(__file__).resolve().parents[2] / "tools" / "gpu_check.py"


def run(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), "--device", "cpu", "--out", str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", [check.name for check in CHECKS])
def test_every_check_runs_in_small_and_finds_nothing_wrong(name: str, tmp_path: Path) -> None:
    done = run(tmp_path, "--only", name)
    found = [json.loads(line) for line in (tmp_path / LINES).read_text().splitlines()]
    assert done.returncode == 0, found
    assert found[-1]["what"] == "took"
    assert len(found) > 1
    rows = (tmp_path / TABLE).read_text().splitlines()
    assert len(rows) == 2 + len(found)


def test_a_check_that_fails_or_takes_too_long_stops_itself_alone() -> None:
    broken = Check("environment", 30, True, "", {"PYTHONPATH": "", "PYTHONHOME": "/nowhere"})
    ended, took = run_apart(broken, "cpu", small=True, seconds=30)
    assert ended.passed is False
    assert ended.value
    late = next(check for check in CHECKS if check.name == "bits")
    *_, ended, took = run_apart(late, "cpu", small=True, seconds=0.5)
    assert ended.value == "stopped after 0 s"
    assert ended.passed is False
    assert took.what == "took"


def test_the_short_list_is_the_one_that_decides() -> None:
    assert [check.name for check in CHECKS if check.short] == [
        "environment",
        "smoke",
        "bits",
        "steps",
    ]
    assert sum(check.seconds for check in CHECKS if check.short) <= 300


def test_a_number_that_differs_is_found() -> None:
    x = awkward(64)
    other = x.clone()
    other[5] = torch.nextafter(other[5], torch.tensor(torch.inf))
    name, text, _, passed = unequal("x", other, x, x)
    assert (name, passed) == ("x", False)
    assert text.startswith("1 of 64 differ, first ")
    assert unequal("x", x, x.clone())[3] is True
    nothing = torch.full((2,), torch.nan)
    assert unequal("x", nothing, nothing.clone())[3] is True


def test_the_table_says_what_is_not_as_it_must_be() -> None:
    rows = table([Finding("a", "b | c", 0.123456, "s"), Finding("a", "d", "no", passed=False)])
    assert "| a | b | c | 0.1235 s |  |" in rows
    assert rows.strip().endswith("| a | d | no | **no** |")


def test_what_is_missing_is_named_with_the_way_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert gpu_check.missing() == []
    monkeypatch.setitem(gpu_check.NEEDED, "no_such_module", "such-package")
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--wheels", str(tmp_path)])
    assert gpu_check.main() == 2
    said = capsys.readouterr().err
    assert said.startswith(f"missing: such-package, and no wheels in {tmp_path}")
    assert said.endswith("pip download --no-deps --dest wheels such-package\n")


def test_what_is_missing_comes_from_wheels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("pip")
    described = "such_package-1.dist-info"
    with zipfile.ZipFile(tmp_path / "such_package-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("no_such_module.py", "value = 7")
        wheel.writestr(
            f"{described}/METADATA", "Metadata-Version: 2.1\nName: such-package\nVersion: 1"
        )
        wheel.writestr(
            f"{described}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any"
        )
        wheel.writestr(f"{described}/RECORD", "")
    monkeypatch.setenv("PYTHONPATH", "")
    assert install(["such-package"], tmp_path) == ""
    asked = [sys.executable, "-c", "import no_such_module; print(no_such_module.value)"]
    assert subprocess.run(asked, capture_output=True, text=True, check=True).stdout == "7\n"
    assert "another-package" in install(["another-package"], tmp_path)
