from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ptq4sam.cli import main
from ptq4sam.data import CocoDataset
from ptq4sam.prompts import GroundTruth, write_results
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.terminal import guarded
from tests.tiny_runs import (
    QUICK,
    SCHEMES,
    Quantized,
    Tiny,
    numbers,
    read_metrics,
    run,
    without_times,
)

pytest_plugins = ("tests.tiny_fixtures",)

AP = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR")


@pytest.fixture(autouse=True)
def _elsewhere(elsewhere: Path) -> None:
    """Nothing is written beside the repository."""


@pytest.fixture(scope="module")
def truth_metrics(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The float model with annotated boxes."""
    work_dir = tmp_path_factory.mktemp("float")
    run("evaluate", *tiny.model(), *tiny.data(), "--work-dir", work_dir)
    assert (work_dir / "run.log").read_text().count("evaluate") >= 2
    return read_metrics(work_dir)


def test_metrics_of_a_float_model_with_annotated_boxes(truth_metrics: dict[str, object]) -> None:
    metrics = truth_metrics
    assert {*AP, "mean_iou", "seed", "versions", "stages", "device"} <= metrics.keys()
    assert metrics["quantized"] is False
    assert "agreement" not in metrics
    assert (metrics["pictures"], metrics["skipped"]) == (3, {})
    assert set(metrics["versions"]) >= {"ptq4sam", "torch", "numpy", "python"}
    for stage in metrics["stages"].values():
        assert stage["seconds"] >= 0
        assert stage["peak_memory_bytes"] > 2**20
    assert {"load", "evaluate"} <= metrics["stages"].keys()


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


def test_boxes_of_a_detector_are_a_file_like_any_other(tiny: Tiny, tmp_path: Path) -> None:
    run("prompts", "--detector", "scene-detector", *tiny.data(), "--out", "boxes.json")
    asked = ["evaluate", *tiny.model(), *tiny.data()]
    metrics = []
    for spec in ("boxes.json", "scene-detector"):
        run(*asked, "--prompts", spec, "--work-dir", tmp_path / "w")
        metrics.append(read_metrics(tmp_path / "w")["AP"])
    assert metrics[0] == metrics[1]


def test_a_data_set_can_be_named_by_its_annotations(tiny: Tiny) -> None:
    run("prompts", "--detector", "scene-detector", *tiny.data(), "--out", "boxes.json")
    asked = ["prompts", "--detector", "scene-detector", "--dataset", tiny.annotations()]
    run(*asked, "--out", "same.json")
    assert Path("same.json").read_bytes() == Path("boxes.json").read_bytes()


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ([], "give --dataset or --images"),
        (["--dataset", "coco", "--images", "."], "leave --images and --annotations away"),
    ],
)
def test_prompts_of_no_or_two_data_sets(
    given: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["prompts", "--detector", "scene-detector", "--out", "boxes.json", *given]
    assert main(command) == 2
    assert problem in capsys.readouterr().err


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
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
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


def test_quantizing_reports_agreement_audit_and_scheme(quantized: Quantized) -> None:
    metrics = quantized.metrics
    assert metrics["quantized"] is True
    assert metrics["audit"]["passed"] is True
    assert 0 <= metrics["agreement"] <= 1
    assert {*AP, "mean_iou"} <= metrics.keys()
    assert {*AP, "mean_iou"} == metrics["float"].keys()
    assert {"calibration boxes", "quantize", "audit", "save", "evaluate"} <= set(metrics["stages"])
    scheme = Scheme.from_yaml(quantized.work_dir / "scheme.yaml")
    asked = Scheme.from_yaml(SCHEMES / "ptq4sam-s44.yaml").with_overrides(*QUICK, "calibrate=2")
    assert scheme == asked


def test_float_scores_beside_quantized_ones_are_those_of_a_float_run(
    quantized: Quantized, truth_metrics: dict[str, object]
) -> None:
    assert quantized.metrics["float"]["mean_iou"] == truth_metrics["mean_iou"]


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
    tiny: Tiny, quantized: Quantized, tmp_path: Path
) -> None:
    run("evaluate", "--checkpoint", quantized.path, *tiny.data(), "--work-dir", "alone")
    metrics = read_metrics(tmp_path / "alone")
    assert "agreement" not in metrics
    assert "float" not in metrics
    assert metrics["mean_iou"] == quantized.metrics["mean_iou"]


def test_audit_of_a_file(quantized: Quantized, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(quantized.path)]) == 0
    assert capsys.readouterr().out.startswith("audit passed")


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


def test_damaged_pictures(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for path in tiny.images().iterdir():
        content = path.read_bytes()
        (images / path.name).write_bytes(content[:900] if path.stem == "000002" else content)
    asked = ["evaluate", *tiny.model(), "--images", str(images), "--work-dir", "w"]
    asked += ["--annotations", str(tiny.annotations())]
    assert "000002.jpg" in _refusal(capsys, *asked)
    run(*asked, "--skip-bad")
    metrics = read_metrics(tmp_path / "w")
    assert (metrics["pictures"], metrics["skipped"]) == (2, {"damaged image": 1})


def _refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that the command ends with."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    told = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert errors.splitlines()[-1] == told[0]
    assert len(told) == 1
    return told[0]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (["--images", "nowhere"], "nowhere"),
        (["--annotations", "nowhere.json"], "nowhere.json"),
        (["--annotations", "empty.json"], "no image"),
        (["--annotations", "broken.json"], "broken.json"),
        (["--checkpoint", "nowhere.pth"], "nowhere.pth"),
        (["--model", "vit_b"], "vit_nano"),
        (["--model", "vit_x"], "vit_b, vit_l"),
        (["--prompts", "scene-detektor"], "did you mean scene-detector"),
        (["--prompts", "nowhere.json"], "nowhere.json"),
        (["--prompts", "others.json"], "none of which is among the"),
        (["--prompts", "onnx:nowhere.onnx"], "nowhere.onnx"),
        (["--limit", "0"], "1 or more"),
        (["--max-per-image", "0"], "1 or more"),
        (["--score-threshold", "2"], "0 to 1"),
        (["--seed", "-1"], "seed"),
        (["--device", "cuda:99"], "found cpu"),
        (["--device", "meta"], "found cpu"),
        (["--device", "abacus"], "abacus"),
        (["--work-dir", "broken.json/w"], "broken.json/w"),
        (["--out", "folder"], "folder"),
        (["--show-dir", "broken.json"], "broken.json"),
        (["--scheme", "exp/nowhere.yaml"], "nowhere.yaml"),
        (["--scheme-options", "recon.iters=2"], "--scheme"),
        (["--scheme", "SCHEME"], "--calibration-images"),
        (["--scheme", "SCHEME", "--scheme-options", "calibrat=2"], "calibrate"),
        (["--scheme", "SCHEME", "CALIBRATION", "--calibration-size", "0"], "1 or more"),
        (["--scheme", "SCHEME", "--calibration-annotations", "a.json"], "--calibration-images"),
        (["--scheme", "SCHEME", "--calibration-images", "IMAGES"], "ground-truth"),
        (["--float-checkpoint", "broken.json"], "not quantized"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(
    tiny: Tiny,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changed: list[str],
    told: str,
) -> None:
    content = json.loads(tiny.annotations().read_text())
    (tmp_path / "empty.json").write_text(json.dumps({**content, "images": [], "annotations": []}))
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "folder").mkdir()
    other = {"image_id": 77, "category_id": 1, "bbox": [0, 0, 9, 9], "score": 1.0}
    (tmp_path / "others.json").write_text(json.dumps([other]))
    given: list[str] = []
    for word in changed:
        if word == "CALIBRATION":
            given += tiny.calibration()
        else:
            places = {"SCHEME": SCHEMES / "ptq4sam-s44.yaml", "IMAGES": tiny.images("train")}
            given.append(str(places.get(word, word)))
    asked = ["evaluate", *tiny.model(), *tiny.data(), "--work-dir", "w", *given]
    assert told in _refusal(capsys, *asked)


def test_bad_combinations_with_a_quantized_file_are_one_line(
    tiny: Tiny, quantized: Quantized, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["evaluate", *tiny.data(), "--checkpoint", quantized.path, "--work-dir", "w"]
    assert "quantized already" in _refusal(capsys, *asked, *tiny.scheme("ptq4sam-s44"))
    state = load_file(tiny.checkpoint)
    state["image_encoder.pos_embed"] += 1
    save_file(state, tmp_path / "other.safetensors")
    told = _refusal(capsys, *asked, "--float-checkpoint", "other.safetensors")
    assert "not made of other.safetensors" in told
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(quantized.path.read_bytes()[:5000])
    assert "cut.safetensors" in _refusal(capsys, "audit", cut)
    assert "not a quantized model" in _refusal(capsys, "audit", tiny.checkpoint)
    assert "does not exist" in _refusal(capsys, "audit", "nowhere.safetensors")


def test_quantize_needs_a_scheme_and_a_name_for_its_output(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["quantize", *tiny.model(), "--work-dir", "w"]
    assert "--scheme" in _refusal(capsys, *asked, "--output", "q.safetensors")
    scheme = tiny.scheme("config44", "compat=published")
    assert "*.safetensors" in _refusal(capsys, *asked, *scheme, "--output", "q.pth")
    assert "published" in _refusal(capsys, *asked, *scheme, "--output", "q.safetensors")


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


def test_system_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fill_disk() -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.json")

    assert guarded(fill_disk) == 2
    assert capsys.readouterr().err == "error: metrics.json: No space left on device\n"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to..."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
    ],
)
def test_out_of_memory_names_the_knob(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise error

    assert guarded(fail) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: out of memory")
    assert "--memory-budget" in told
    assert told.count("\n") == 1


def test_other_runtime_errors_are_not_hidden() -> None:
    def fail() -> int:
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        guarded(fail)


def test_log_is_left_as_it_was(tiny: Tiny) -> None:
    logger = logging.getLogger("ptq4sam")
    before = list(logger.handlers)
    assert main(["evaluate", *tiny.model(), *tiny.data(), "--limit", "0"]) == 2
    assert logger.handlers == before


def test_scenes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("scenes", "a", "--train", 1, "--val", 2)
    train = CocoDataset(tmp_path / "a/images/train", tmp_path / "a/annotations/train.json")
    val = CocoDataset(tmp_path / "a/images/val", tmp_path / "a/annotations/val.json")
    assert (len(train.images), len(val.images)) == (1, 2)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "1 scenes in a/images/train, annotations a/annotations/train.json"
    assert said[1].startswith("2 scenes in a/images/val")
    assert not np.array_equal(train.load(train.images[0]), val.load(val.images[0]))
    assert "at least one scene" in _refusal(capsys, "scenes", "b", "--train", 0)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--backend", "openvine"], "backend 'openvine' was asked for: use torch, integer"),
        (["--backend", "onnxruntime", "--precision", "bf16"], "openvino has f32 and bf16"),
    ],
)
def test_a_misspelt_backend_is_told_before_files_are_looked_for(
    given: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (
        ["evaluate", "--images", "nowhere", "--annotations", "nowhere.json"],
        ["everything", "--images", "nowhere", "--out", "o"],
    ):
        assert told in _refusal(capsys, *command, "--checkpoint", "nothing", *given)


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


def test_a_quantized_file_of_another_model(
    tiny: Tiny, quantized: Quantized, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "--model", "vit_b", "--checkpoint", str(quantized.path)]
    assert main([*command, *map(str, tiny.data())]) == 2
    assert "asked for vit_b, but" in " ".join(capsys.readouterr().err.split())


def test_no_scheme_is_left_beside_the_numbers_of_a_float_model(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "scheme.yaml").write_text("of another run")
    run("evaluate", *tiny.model(), *tiny.data(), "--limit", "1", "--work-dir", tmp_path / "w")
    assert not (tmp_path / "w" / "scheme.yaml").exists()
