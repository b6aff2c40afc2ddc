"""The first thing that a new user runs."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest

from ptq4sam.runs import demo
from tests.tiny_runs import AP, QUICK, read_metrics, run

pytest_plugins = ("tests.tiny_fixtures",)


def test_the_demo_in_an_empty_folder_ends_without_a_warning(
    small_nano: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With two pictures and steps for thirty and twenty."""
    monkeypatch.chdir(tmp_path)
    for name, least in (("_CALIBRATION_SCENES", 1), ("_SCENES", 2), ("_RECONSTRUCTION_STEPS", 2)):
        assert getattr(demo, name) > least
        monkeypatch.setattr(demo, name, least)
    # The search for the best grid of every weight takes most of so short a run.
    scheme = demo.demo_scheme
    monkeypatch.setattr(demo, "demo_scheme", lambda bits: scheme(bits).with_overrides(*QUICK))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        run("demo")
    assert [str(warning.message) for warning in warned] == []
    assert [r.getMessage() for r in caplog.records if r.levelno > logging.INFO] == []
    assert [path.name for path in tmp_path.iterdir()] == ["work_dirs"]
    told = capsys.readouterr().out
    for bits in (6, 4):
        assert f"W{bits}A{bits}, PTQ4SAM-L, boxes of the scene detector" in told
        work_dir = Path(f"work_dirs/demo/w{bits}a{bits}")
        metrics = read_metrics(work_dir)
        assert metrics["quantized"]
        assert metrics["audit"]["passed"]
        assert set(AP) <= set(metrics)
        assert list((work_dir / "show").iterdir())
        assert (work_dir / "model.safetensors").is_file()
    assert "work_dirs/demo/w4a4/show" in told
