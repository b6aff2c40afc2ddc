"""`ptq4sam evaluate` of float models: scores, boxes, pictures, what is left behind."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ptq4sam.cli import main
from ptq4sam.data import CocoDataset
from ptq4sam.prompts import GroundTruth, write_results
from tests.tiny_runs import AP, REPOSITORY, Tiny, read_metrics, refusal, run, without_times

pytest_plugins = ("tests.tiny_fixtures",)

# Nothing is written beside the repository.
pytestmark = pytest.mark.usefixtures("elsewhere")


def test_metrics_of_a_float_model_with_annotated_boxes(truth_metrics: dict[str, object]) -> None:
    metrics = truth_metrics
    assert {*AP, "mean_iou", "seed", "versions", "phases", "device"} <= metrics.keys()
    assert metrics["quantized"] is False
    assert "agreement" not in metrics
    assert (metrics["pictures"], metrics["skipped"]) == (3, {})
    assert set(metrics["versions"]) >= {"ptq4sam", "torch", "numpy", "python"}
    for phase in metrics["phases"].values():
        assert phase["seconds"] >= 0
        assert phase["peak_memory_bytes"] > 2**20
    assert {"load", "evaluate"} <= metrics["phases"].keys()


def test_boxes_from_a_file_score_as_the_same_boxes_from_the_annotations(
    tiny: Tiny, truth_metrics: dict[str, object], tmp_path: Path
) -> None:
    dataset = CocoDataset(tiny.images(), tiny.annotations())
    source = GroundTruth(dataset)
    boxes = tmp_path / "boxes.json"
    write_results([source.prompts(r, dataset.load(r)) for r in dataset.images], boxes)
    run("evaluate", *tiny.model(), *tiny.data(), "--prompts", boxes, "--work-dir", tmp_path / "w")
    metrics = read_metrics(tmp_path / "w")
    assert [metrics[key] for key in AP] == [truth_metrics[key] for key in AP]
    assert metrics["masks"] == truth_metrics["masks"]
    assert "mean_iou" not in metrics


def test_boxes_from_a_file_need_no_detector(tiny: Tiny, tmp_path: Path) -> None:
    dataset = CocoDataset(tiny.images(), tiny.annotations())
    truth = GroundTruth(dataset)
    write_results([truth.prompts(r, dataset.load(r)) for r in dataset.images], Path("boxes.json"))
    command = ["evaluate", *tiny.model(), *tiny.data(), "--prompts", "boxes.json"]
    command += ["--work-dir", tmp_path / "w"]
    script = (
        "import sys; from ptq4sam.cli import main; code = main(sys.argv[1:]);"
        "libraries = {'torchvision', 'onnxruntime', 'mmengine', 'mmcv', 'mmdet', 'transformers'};"
        "found = libraries & set(sys.modules);"
        "sys.exit(f'imported {found}' if found else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, command)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_scene_detector_is_asked_once(tiny: Tiny, tmp_path: Path) -> None:
    asked = ["evaluate", *tiny.model(), *tiny.data(), "--prompts", "scene-detector"]
    asked += ["--limit", "1", "--max-per-image", "3"]
    run(*asked, "--work-dir", "first", "--show-dir", "shown", "--out", "masks/all.json")
    kept = list((tmp_path / "work_dirs" / "prompts").rglob("*.json"))
    assert len(kept) == 1
    written = kept[0].stat().st_mtime_ns
    run(*asked, "--work-dir", "second")
    assert kept[0].stat().st_mtime_ns == written
    first = read_metrics(tmp_path / "first")
    assert without_times(first) == without_times(read_metrics(tmp_path / "second"))
    assert (first["pictures"], first["masks"]) == (1, 3)
    masks = json.loads((tmp_path / "masks" / "all.json").read_text())
    assert len(masks) == 3
    assert set(masks[0]) == {"image_id", "category_id", "segmentation", "score"}
    with Image.open(tmp_path / "shown" / "000001.jpg") as picture:
        assert picture.size == (320, 256)


def test_folder_of_pictures_is_segmented_without_a_score(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(
        *("evaluate", *tiny.model(), "--images", tiny.images(), "--prompts", "scene-detector"),
        *("--max-per-image", "2", "--out", "masks.json", "--work-dir", "w"),
    )
    printed = capsys.readouterr()
    assert "not scored" in " ".join(printed.err.split())
    assert "6 masks on 3 pictures" in printed.out
    metrics = read_metrics(tmp_path / "w")
    assert not {*AP, "mean_iou", "agreement"} & metrics.keys()
    assert len(json.loads((tmp_path / "masks.json").read_text())) == metrics["masks"] == 6
    shown = {path.name for path in (tmp_path / "w" / "show").iterdir()}
    assert shown == {"000001.jpg", "000002.jpg", "000003.jpg"}


def test_damaged_pictures(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for path in tiny.images().iterdir():
        content = path.read_bytes()
        (images / path.name).write_bytes(content[:900] if path.stem == "000002" else content)
    asked = ["evaluate", *tiny.model(), "--images", str(images), "--work-dir", "w"]
    asked += ["--annotations", str(tiny.annotations())]
    assert "000002.jpg" in refusal(capsys, *asked)
    run(*asked, "--skip-bad")
    metrics = read_metrics(tmp_path / "w")
    assert (metrics["pictures"], metrics["skipped"]) == (2, {"damaged image": 1})


def test_log_is_left_as_it_was(tiny: Tiny) -> None:
    logger = logging.getLogger("ptq4sam")
    before = list(logger.handlers)
    assert main(["evaluate", *tiny.model(), *tiny.data(), "--limit", "0"]) == 2
    assert logger.handlers == before


def test_no_scheme_is_left_beside_the_numbers_of_a_float_model(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "scheme.yaml").write_text("of another run")
    run("evaluate", *tiny.model(), *tiny.data(), "--limit", "1", "--work-dir", tmp_path / "w")
    assert not (tmp_path / "w" / "scheme.yaml").exists()
