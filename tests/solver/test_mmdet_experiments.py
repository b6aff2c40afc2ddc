"""The published experiments with YOLOX and Faster R-CNN: what is missing is named, and they run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from ptq4sam.downloads import ASSETS
from ptq4sam.errors import CheckpointError, DependencyError
from ptq4sam.solver.experiment import DetectorConfig, ExperimentConfig
from ptq4sam.solver.test_quant import main
from tests.mmdet_models import random_detector, require_mmdet
from tests.tiny_runs import REPOSITORY, Tiny, read_metrics

pytest_plugins = ("tests.tiny_fixtures",)

EXPERIMENTS = [
    path
    for folder in ("yolox", "faster_rcnn")
    for path in sorted((REPOSITORY / "projects" / "configs" / folder).glob("*.py"))
]
PUBLISHED = [path for path in EXPERIMENTS if "nano" not in path.stem]


@pytest.fixture(autouse=True)
def _elsewhere(elsewhere: Path) -> None:
    """No weights, and nothing is written beside the repository."""


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_missing_weights_are_named_with_their_source_and_checksum(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = ExperimentConfig.from_file(path)
    assert main(["--config", str(path), "--fp"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    _names(told, experiment.detector.checkpoint)
    if experiment.sam.checkpoint is not None:
        assert main(["--config", str(path), "--fp", "--prompts", "boxes.json"]) == 2
        _names(" ".join(capsys.readouterr().err.split()), experiment.sam.checkpoint)


def _names(message: str, file: Path | None) -> None:
    """The message is about that file, and says from where and with which checksum."""
    assert file is not None
    (asset,) = [asset for asset in ASSETS.values() if asset.path == file]
    assert f"needs {file}, which is not there: ptq4sam download {asset.name}, or" in message
    assert asset.url in message
    if file.name == "yolox_l.pth":
        assert "(the publisher gives no checksum)" in message
    elif file.suffix == ".pth":
        assert asset.digest is not None
        assert asset.digest.beginning in file.stem  # OpenMMLab and SAM put it into the name
        assert re.search(rf"its (md5|sha256) begins with {asset.digest.beginning}", message)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    "variant", ["use_sam_iou=False", "best_in_multi_mask=True", "cascade=True"]
)
def test_variants_are_options(path: Path, variant: str) -> None:
    key, _, value = variant.partition("=")
    assert getattr(ExperimentConfig.from_file(path).prompting, key) != (value == "True")
    changed = ExperimentConfig.from_file(path, f"prompting.{variant}")
    assert getattr(changed.prompting, key) == (value == "True")


def test_a_file_nobody_publishes_is_named(tmp_path: Path) -> None:
    own = DetectorConfig("mmdet", tmp_path / "own.pth", config="own.py")
    with pytest.raises(CheckpointError, match=r"own\.pth, which is not there: name another"):
        own.require_weights()
    (tmp_path / "own.pth").touch()
    own.require_weights()


def test_without_mmdetection_the_command_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = DetectorConfig("mmdet", Path("a.pth"), config="a.py")
    monkeypatch.setattr("ptq4sam.solver.experiment.find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r"\./environment\.sh mmdet.*--prompts boxes\.json"):
        detector.require_available()


@pytest.mark.parametrize(
    ("experiment", "options"),
    [
        ("yolox/yolo_l-sam-vit-b.py", []),
        ("faster_rcnn/faster-rcnn-r50_sam-vit-b.py", ["prompting.best_in_multi_mask=True"]),
    ],
)
def test_an_experiment_runs(
    tiny: Tiny, tmp_path: Path, experiment: str, options: list[str]
) -> None:
    """The real detectors with random weights, on one scene and with a small SAM."""
    require_mmdet()
    path = REPOSITORY / "projects" / "configs" / experiment
    detector = ExperimentConfig.from_file(path).detector
    config = REPOSITORY / str(detector.config)
    torch.save({"state_dict": random_detector(config).state_dict()}, tmp_path / "detector.pth")
    options = [
        *options,
        "sam.type=vit_nano",
        f"sam.checkpoint={tiny.checkpoint}",
        f"detector.config={config}",
        f"detector.checkpoint={tmp_path / 'detector.pth'}",
        f"data.images={tiny.images()}",
        f"data.annotations={tiny.annotations()}",
        "data.limit=1",
    ]
    asked = ["--config", str(path), "--fp", "--work-dir", "run", "--out", "masks.json"]
    assert main([*asked, "--cfg-options", *options]) == 0
    assert "AP" in read_metrics(Path("run"))
    (kept,) = Path("work_dirs/prompts").glob("mmdet-*/*.json")
    boxes = json.loads(kept.read_text())["boxes"]
    assert 0 < len(boxes) <= 100
    assert len(json.loads(Path("masks.json").read_text())) == len(boxes)
