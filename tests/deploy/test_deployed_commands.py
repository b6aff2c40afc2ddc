"""From a quantized file to scores on the runtimes, by the commands."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from ptq4sam.cli import main
from tests.tiny_runs import SCHEMES, Tiny, read_metrics, run

pytest_plugins = ("tests.tiny_fixtures",)


@pytest.fixture(scope="module")
def deployed(
    small_nano_in_module: None, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A small embedded model at 8 bits and its exports in the folder beside it."""
    folder = tmp_path_factory.mktemp("deployed")
    path = folder / "w8a8.safetensors"
    run(
        *("quantize", "--scheme", SCHEMES / "w8a8.yaml", "--output", path),
        *("--scheme-options", "w_qconfig.observer=MinMaxObserver", *tiny.calibration()),
        *("--work-dir", folder / "work"),
    )
    for name in ("onnx", "openvino"):
        run("export", path, "--format", name, "--output", folder / "w8a8")
    return path


@pytest.fixture(scope="module")
def simulated(deployed: Path, tiny: Tiny) -> dict[str, Any]:
    """Metrics of the simulation."""
    work_dir = deployed.parent / "simulated"
    run("evaluate", "--checkpoint", deployed, *tiny.data(), "--work-dir", work_dir)
    return read_metrics(work_dir)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "integer", "auto"])
def test_deployed_models_score_as_the_simulation(
    backend: str,
    deployed: Path,
    simulated: dict[str, Any],
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = deployed if backend == "integer" else deployed.with_suffix("")
    command = ["evaluate", "--checkpoint", checkpoint, "--backend", backend, *tiny.data()]
    run(*command, "--work-dir", tmp_path / "deployed")
    found = read_metrics(tmp_path / "deployed")
    assert found["quantized"]
    assert found["backend"] in ("onnxruntime", "openvino", "integer")
    assert found["masks"] == simulated["masks"]
    assert math.isclose(found["mean_iou"], simulated["mean_iou"], abs_tol=0.02)
    # With the float model, which both know that they were made of.
    assert math.isclose(found["agreement"], simulated["agreement"], abs_tol=0.02)


@pytest.mark.parametrize("named", ["", "encoder.xml"])
def test_an_exported_folder_needs_no_backend(
    named: str,
    deployed: Path,
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = deployed.with_suffix("") / named
    run("evaluate", "--checkpoint", checkpoint, *tiny.data(), "--limit", 1, "--work-dir", "w")
    runtime = "openvino" if named else "onnxruntime"
    assert read_metrics(tmp_path / "w")["backend"] == runtime
    options = ("--options", "points_per_side=2", "--limit", 1)
    run("everything", "--checkpoint", checkpoint, "--images", tiny.images(), "--out", "o", *options)
    assert (tmp_path / "o" / "masks.json").is_file()
    sparse = ("points_per_side=4", "hierarchical.coarser=2", "hierarchical.high_score_thresh=-1000")
    hierarchical = ("--hierarchical", "--options", "pred_iou_thresh=0", "stability_score_thresh=0")
    asked = ("everything", "--checkpoint", checkpoint, "--images", tiny.images(), "--limit", 1)
    run(*asked, "--out", "h", *hierarchical, *sparse)
    assert "4 points, 12 masks proposed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["export", "nowhere.safetensors", "--format", "onnx"], "not there: quantized model now"),
        (["export", "vit_b", "--format", "onnx"], "vit_b"),
        (["export", "vit_nano", "--format", "tflite"], "use onnx or openvino"),
        (["evaluate", "--backend", "openvino"], "give it as the checkpoint"),
        (["evaluate", "--checkpoint", "DEPLOYED", "--backend", "torch"], "which torch does not"),
        (["evaluate", "--checkpoint", "DEPLOYED", "--backend", "integer"], "no quantized model"),
        (["evaluate", "--checkpoint", "."], "config.json is missing, found"),
        (["evaluate", "--backend", "tpu", "--checkpoint", "."], "use torch, integer, onnxruntime"),
        (["evaluate", "--backend", "torch-int8", "--checkpoint", "."], "int8 any more: use torch"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    problem: str,
    deployed: Path,
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    more = ["--output", "exported"] if arguments[0] == "export" else list(map(str, tiny.data()))
    places = {"DEPLOYED": str(deployed.with_suffix(""))}
    assert main([places.get(word, word) for word in [*arguments, *more]]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert problem in lines[-1]
    assert not (tmp_path / "exported" / "onnx.json").exists()
