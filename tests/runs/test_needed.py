"""Every command says at once, in one line, all that it lacks and how to get it."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from ptq4sam.cli import main
from ptq4sam.downloads import ASSETS, asset_at
from ptq4sam.runs.configs.experiment import ExperimentConfig
from ptq4sam.solver.test_quant import main as published
from tests.tiny_runs import REPOSITORY, Tiny

pytest_plugins = ("tests.tiny_fixtures",)

EXPERIMENTS = [
    path
    for folder in ("yolox", "faster_rcnn", "hdetr", "focalnet_dino")
    for path in sorted((REPOSITORY / "projects" / "configs" / folder).glob("*.py"))
]
SCHEME = REPOSITORY / "exp" / "config66.yaml"


@pytest.fixture(autouse=True)
def _elsewhere(elsewhere: Path) -> None:
    """Neither weights nor data are here."""


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """The listing, with one space between words."""
    listing = capsys.readouterr().err
    assert listing.startswith("error: not there:")
    # Only a name, alone on its line, may be longer than a terminal is wide, and a command.
    for line in listing.splitlines():
        assert len(line) <= 80 or line.startswith("  ") or listing.count("\n") == 1, line
    return " ".join(listing.split())


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_a_configuration_without_anything_here(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--config", str(path), "--q_config", str(SCHEME), "--quant-encoder"]
    assert published(asked) == 2
    told = refusal(capsys)
    read = ExperimentConfig.from_file(path)
    assert read.calibration is not None
    needed = [read.detector.checkpoint, read.sam.checkpoint, read.data.images]
    needed += [read.data.annotations, read.calibration.images, read.calibration.annotations]
    downloads = []
    for file in filter(None, needed):
        assert f" {file}" in told
        asset = asset_at(file, 32 if file == read.calibration.images else None)
        if asset is not None and asset.name not in downloads:
            downloads.append(asset.name)
            assert f" {asset.size_text} {urlsplit(asset.url).netloc} " in told
    assert f" run ptq4sam download {' '.join(downloads)} " in told
    assert "coco-train" not in told
    assert told.endswith("prompts boxes.json")
    # coco_mini alone is nowhere to be had.
    assert ("name others for the rest" in told) == ("nano" in path.stem)
    assert not Path("work_dirs").exists()


@pytest.mark.parametrize("name", ["yolox/yolo_l-sam-vit-b", "hdetr/r50-hdetr_sam-vit-l"])
def test_only_what_is_asked_for_is_needed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = REPOSITORY / "projects" / "configs" / f"{name}.py"
    Path("boxes.json").write_text("[]")
    assert published(["--config", str(config), "--fp", "--prompts", "boxes.json"]) == 2
    told = refusal(capsys)
    assert "train2017" not in told
    assert "detector" not in told
    assert told.endswith("coco-val coco-annotations")


def test_a_detector_that_is_not_installed_is_told_with_the_files(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptq4sam.downloads.missing.find_spec", lambda name: None)
    config = REPOSITORY / "projects/configs/faster_rcnn/faster-rcnn-r50_sam-vit-b.py"
    assert published(["--config", str(config), "--fp"]) == 2
    told = refusal(capsys)
    assert "mmengine, mmcv, mmdet (packages that detector mmdet needs)" in told
    assert "coco-annotations ./environment.sh mmdet boxes of any detector" in told


def test_evaluate_names_checksum_and_size_of_weights(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["evaluate", *tiny.data(), "--checkpoint", "ckpt/sam_vit_b_01ec64.pth"]
    assert main(asked) == 2
    assert refusal(capsys) == (
        "error: not there: size from SAM ckpt/sam_vit_b_01ec64.pth 375 MB "
        f"{urlsplit(ASSETS['sam-vit-b'].url).netloc} run ptq4sam download sam-vit-b"
    )


def test_weights_of_another_name(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["evaluate", *tiny.data(), "--checkpoint", "own.pth"]
    assert main([*asked, "--model", "vit_l"]) == 2
    assert "own.pth (the official one: ptq4sam download sam-vit-l)" in refusal(capsys)
    assert main(asked) == 2
    assert "own.pth (name another, or none for the embedded weights)" in refusal(capsys)


def test_boxes_of_a_named_data_set(capsys: pytest.CaptureFixture[str]) -> None:
    named = Path("projects/configs/_base_")
    named.mkdir(parents=True)
    coco = REPOSITORY / named / "coco.py"
    (named / "coco.py").write_text(coco.read_text())
    asked = ["prompts", "--detector", "onnx:ckpt/yolox_nano.onnx", "--dataset", "coco"]
    assert main([*asked, "--out", "boxes.json"]) == 2
    told = refusal(capsys)
    assert "pictures data/coco/val2017 816 MB images.cocodataset.org" in told
    assert told.endswith(" run ptq4sam download yolox-nano-onnx coco-val coco-annotations")


def test_masks_of_everything_and_exports(capsys: pytest.CaptureFixture[str]) -> None:
    weights = ["--checkpoint", "ckpt/sam_vit_b_01ec64.pth"]
    assert main(["everything", "--images", "none", *weights, "--out", "masks"]) == 2
    told = refusal(capsys)
    assert "pictures none" in told
    assert "run ptq4sam download sam-vit-b" in told
    assert main(["export", "vit_b", *weights, "--format", "onnx", "--output", "exported"]) == 2
    assert "375 MB dl.fbaipublicfiles.com run ptq4sam download sam-vit-b" in refusal(capsys)


def test_a_data_set_by_its_annotations(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["prompts", "--detector", "scene-detector", "--out", "boxes.json", "--dataset"]
    assert main([*asked, "data/coco/annotations/instances_val2017.json"]) == 2
    assert "ptq4sam download coco-annotations (253 MB)" in capsys.readouterr().err


def test_everything_of_a_quantization(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    calibration = ["--calibration-images", "ci", "--calibration-annotations", "ca.json"]
    validation = ["--validation-images", "vi", "--validation-annotations", "va.json"]
    asked = ["quantize", *calibration, *validation, "--max-drop", "1", "--output", "q.safetensors"]
    assert main([*asked, "--scheme", str(SCHEME), "--calibration-prompts", "b.json"]) == 2
    told = refusal(capsys)
    for part in ("ci", "ca.json", "vi", "va.json", "file of boxes b.json"):
        assert part in told


def test_what_is_there_is_not_asked_for(tiny: Tiny) -> None:
    content = json.loads(tiny.annotations().read_text())
    assert content["images"]
    assert main(["evaluate", *tiny.model(), *tiny.data(), "--limit", "1"]) == 0
