"""The published experiments with YOLOX and Faster R-CNN run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ptq4sam.runs.configs.experiment import ExperimentConfig
from ptq4sam.solver.test_quant import main
from tests.mmdet_models import random_detector, require_mmdet
from tests.tiny_runs import REPOSITORY, Tiny, read_metrics

pytest_plugins = ("tests.tiny_fixtures",)

PUBLISHED = [
    path
    for folder in ("yolox", "faster_rcnn")
    for path in sorted((REPOSITORY / "projects" / "configs" / folder).glob("*.py"))
    if "nano" not in path.stem
]


@pytest.fixture(autouse=True)
def _elsewhere(elsewhere: Path, small_nano: None) -> None:
    """No weights, nothing is written beside the repository, and vit_nano is small."""


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    "variant", ["use_sam_iou=False", "best_in_multi_mask=True", "cascade=True"]
)
def test_variants_are_options(path: Path, variant: str) -> None:
    key, _, value = variant.partition("=")
    assert getattr(ExperimentConfig.from_file(path).prompting, key) != (value == "True")
    changed = ExperimentConfig.from_file(path, f"prompting.{variant}")
    assert getattr(changed.prompting, key) == (value == "True")


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
        # The published YOLOX keeps boxes in any number; random weights give thousands.
        "prompting.max_per_image=20",
    ]
    asked = ["--config", str(path), "--fp", "--work-dir", "run", "--out", "masks.json"]
    assert main([*asked, "--cfg-options", *options]) == 0
    assert "AP" in read_metrics(Path("run"))
    (kept,) = Path("work_dirs/prompts").glob("mmdet-*/*.json")
    boxes = json.loads(kept.read_text())["boxes"]
    assert boxes
    assert len(json.loads(Path("masks.json").read_text())) == min(20, len(boxes))
