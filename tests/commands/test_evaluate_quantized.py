"""`ptq4sam evaluate` of quantized files, and of models that it quantizes itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from ptq4sam.quantization.scheme import Scheme
from tests.tiny_runs import Quantized, Tiny, numbers, read_metrics, run, without_times

pytest_plugins = ("tests.tiny_fixtures",)

# Nothing is written beside the repository.
pytestmark = pytest.mark.usefixtures("elsewhere")


def test_file_scores_as_the_model_that_was_written(
    tiny: Tiny, quantized: Quantized, tmp_path: Path
) -> None:
    asked = ["evaluate", "--checkpoint", quantized.path, *tiny.data()]
    compared = ["--float-checkpoint", tiny.checkpoint, "--show-dir", "shown"]
    run(*asked, *compared, "--work-dir", "file")
    metrics = numbers(read_metrics(tmp_path / "file"))
    assert metrics == numbers(quantized.metrics)
    with Image.open(tmp_path / "shown" / "000001.jpg") as picture:
        assert picture.width > 2 * 320


def test_no_agreement_with_weights_that_the_file_was_not_made_of(
    tiny: Tiny, small_nano: None, tmp_path: Path
) -> None:
    scheme = tiny.scheme("minmax44")
    made = ["quantize", "--checkpoint", tiny.checkpoint, *tiny.data(), *scheme]
    run(*made, "--output", "w4a4.safetensors", "--work-dir", "made")
    run("evaluate", "--checkpoint", "w4a4.safetensors", *tiny.data(), "--work-dir", "alone")
    metrics, before = (read_metrics(tmp_path / name) for name in ("alone", "made"))
    assert "agreement" in before
    assert "agreement" not in metrics
    assert "float" not in metrics
    assert metrics["mean_iou"] == before["mean_iou"]


def test_folder_of_pictures_agrees_with_the_float_model(
    tiny: Tiny, quantized: Quantized, tmp_path: Path
) -> None:
    boxes = [{"image_id": n, "category_id": 1, "bbox": [9, 9, 90, 80], "score": 1} for n in (1, 2)]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    run(
        *("evaluate", "--checkpoint", quantized.path, "--float-checkpoint", tiny.checkpoint),
        *("--images", tiny.images(), "--prompts", "boxes.json", "--work-dir", "w"),
    )
    metrics = read_metrics(tmp_path / "w")
    assert 0 <= metrics["agreement"] <= 1
    assert "AP" not in metrics
    assert metrics["masks"] == len(json.loads((tmp_path / "w" / "masks.json").read_text())) == 2


def test_reconstruction_scheme_and_seed(tiny: Tiny, tmp_path: Path) -> None:
    asked = ["evaluate", *tiny.model(), *tiny.data(), "--limit", "1", "--decoder-only"]
    asked += tiny.scheme("config44", "recon.iters=2", "ptq4sam.AGQ=false")
    for work_dir in "ab":
        run(*asked, "--seed", 7, "--work-dir", work_dir, "--out", f"{work_dir}/masks.json")
    first, again = (read_metrics(tmp_path / name) for name in "ab")
    assert without_times(first) == without_times(again)
    assert first["audit"]["passed"]
    assert first["seed"] == 7
    masks = [(tmp_path / name / "masks.json").read_bytes() for name in "ab"]
    assert masks[0] == masks[1]
    assert Scheme.from_yaml(tmp_path / "a" / "scheme.yaml").recon.iters == 2


def test_published_defects_are_warned_about(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(
        *("evaluate", *tiny.model(), *tiny.data(), "--limit", "1", "--decoder-only"),
        *tiny.scheme("config44", "recon.iters=1", "ptq4sam.AGQ=false", "compat=published"),
        *("--work-dir", "w"),
    )
    printed = capsys.readouterr()
    assert "not the numbers of a quantized model" in printed.out
    metrics = read_metrics(tmp_path / "w")
    assert not metrics["audit"]["passed"]
    assert "warning" in metrics


def test_what_was_asked_for_by_name_goes_before_a_preset(tiny: Tiny, tmp_path: Path) -> None:
    asked = ["evaluate", *tiny.model(), *tiny.data(), "--limit", "1", "--decoder-only"]
    asked += [*tiny.scheme("config44", "recon.iters=2"), "--preset", "quick"]
    run(*asked, "--calibration-size", "1", "--work-dir", tmp_path / "w")
    used = Scheme.from_yaml(tmp_path / "w" / "scheme.yaml")
    assert used.recon is not None
    assert (used.recon.iters, used.calibrate) == (2, 1)
    said = read_metrics(tmp_path / "w")["asked"]
    assert said["calibration_pictures"] == 1
    assert said["limit"] == 1
    assert said["data"]["images"] == str(tiny.images())
