"""`--method nncf`, with the real NNCF and OpenVINO, on a SAM of 64 pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ptq4sam.cli import main
from ptq4sam.data.images import read_image
from ptq4sam.deploy.exported import open_exported
from ptq4sam.deploy.manifest import read_manifest
from ptq4sam.families import VARIANTS
from ptq4sam.families.checkpoint import load_sam
from ptq4sam.runs import nncf as nncf_module
from ptq4sam.runs.summary import summary_table
from ptq4sam.sam.predictor import Predictor
from tests.model.conftest import TINY_VARIANT, tiny_sam, tiny_variant  # noqa: F401
from tests.tiny_runs import Tiny, read_metrics, run

pytest_plugins = ("tests.tiny_fixtures",)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    with torch.random.fork_rng():
        state = tiny_sam().state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    return path


def quantizing(tiny: Tiny, checkpoint: Path, output: Path) -> list[str]:
    weights = ["--model", "tiny", "--checkpoint", checkpoint]
    pictures = ["--calibration-images", tiny.images("train"), "--calibration-size", 2]
    given = ["quantize", "--method", "nncf", *weights, *pictures, "--output", output]
    return [str(part) for part in given]


@pytest.fixture
def command(tiny: Tiny, checkpoint: Path, tmp_path: Path) -> list[str]:
    return quantizing(tiny, checkpoint, tmp_path / "int8")


@pytest.fixture(scope="module")
def int8(tiny: Tiny, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes."""
    folder = tmp_path_factory.mktemp("nncf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, "tiny", TINY_VARIANT)
        patch.chdir(folder)
        run(*quantizing(tiny, checkpoint, folder / "int8"))
    return folder / "int8"


def integer_constants(folder: Path) -> int:
    return (folder / "encoder.xml").read_text().count('element_type="i8"')


def test_an_int8_encoder_that_is_scored_as_any_export(
    tiny: Tiny, checkpoint: Path, int8: Path
) -> None:
    run("export", "tiny", "--checkpoint", checkpoint, "--format", "openvino", "--output", "float")
    manifest = read_manifest(int8, "openvino")
    assert manifest.nncf is not None
    assert (manifest.nncf["pictures"], manifest.nncf["preset"]) == (2, "mixed")
    assert manifest.nncf["max_drop"] is None
    # 2 blocks of 4 layers, 2 convolutions of the neck, the patch embedding.
    assert integer_constants(int8) >= 11 > integer_constants(Path("float")) == 0
    sizes = [(folder / "encoder.bin").stat().st_size for folder in (Path("float"), int8)]
    assert sizes[1] < sizes[0] / 2
    float_sam = load_sam("tiny", checkpoint)
    exported = open_exported(int8, "openvino")
    image = read_image(tiny.images() / "000001.jpg")
    expected, found = (Predictor(model).embed(image).features for model in (float_sam, exported))
    error = (found - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.2
    run(
        *("evaluate", "--checkpoint", int8, "--backend", "openvino", *tiny.data()),
        *("--float-checkpoint", checkpoint, "--work-dir", "w"),
    )
    metrics = read_metrics(Path("w"))
    assert metrics["agreement"] > 0.5
    assert "mean_iou" in metrics
    assert (metrics["quantized"], metrics["method"]) == (True, "nncf")
    lines = [line.split("  ")[0] for line in summary_table(metrics).splitlines()[2:]]
    assert [line for line in lines if "by size" not in line] == [
        "float",
        "NNCF INT8",
        "image encoder quantized",
    ]


def test_masks_of_everything_by_an_exported_model(tiny: Tiny, int8: Path) -> None:
    everything = ["points_per_side=2", "pred_iou_thresh=0", "stability_score_thresh=0"]
    run(
        *("everything", "--images", tiny.images(), "--limit", 1, "--out", "all"),
        *("--checkpoint", int8, "--backend", "openvino", "--options", *everything),
    )
    content = json.loads(Path("all/masks.json").read_text())
    assert len(content["annotations"]) >= 1


def test_accuracy_control_stops_where_the_drop_is_met(
    tiny: Tiny, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[float]] = []
    validation = nncf_module._validation

    def watched(*arguments: Any) -> Any:
        found = validation(*arguments)

        def score(model: Any, places: Any) -> list[float]:
            seen.append(found.score(model, places))
            return seen[-1]

        return nncf_module.NncfValidation(found.pictures, score)

    monkeypatch.setattr(nncf_module, "_validation", watched)
    data = ["--validation-images", str(tiny.images())]
    data += ["--validation-annotations", str(tiny.annotations())]
    run(*command, *data, "--max-drop", "30")
    # After a try on one: the float encoder and the quantized one, on three pictures.
    whole = [scores for scores in seen if len(scores) == 3]
    assert len(whole) >= 2
    assert np.mean(whole[0]) - np.mean(whole[-1]) <= 0.3
    manifest = read_manifest(tmp_path / "int8", "openvino")
    assert manifest.nncf is not None
    assert manifest.nncf["max_drop"] == 30
    assert integer_constants(tmp_path / "int8") > 0


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--scheme", "exp/w8a8.yaml"], "--scheme is about PTQ4SAM"),
        (["--resume"], "--resume is about PTQ4SAM"),
        (["--output", "model.safetensors"], "name a folder"),
        (["--calibration-size", "0"], "1 or more"),
        (["--max-drop", "1"], "measured on annotated pictures"),
        (["--drop-metric", "AP", "--max-drop", "1"], "controls the mean IoU"),
        (["--calibration-images", "./nowhere/x"], "not there: calibration pictures nowhere/x"),
    ],
)
def test_what_nncf_cannot_be_asked_for(
    command: list[str], more: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, *more]) == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_a_missing_package_is_named(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "nncf", None)
    assert main(command) == 2
    assert "pip install 'ptq4sam[openvino]'" in " ".join(capsys.readouterr().err.split())


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
