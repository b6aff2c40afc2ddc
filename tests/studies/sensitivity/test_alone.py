"""`ptq4sam sensitivity --alone`: each layer as a published study measures it, and its figures."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ptq4sam.cli import main
from ptq4sam.data import CocoDataset
from ptq4sam.data.scenes import write_scenes
from ptq4sam.errors import DataError
from ptq4sam.evaluation.prompting import Prompting
from ptq4sam.families import VARIANTS
from ptq4sam.families.checkpoint import load_sam
from ptq4sam.families.efficientvit.published import LayerResult
from ptq4sam.families.efficientvit.variants import build_variant
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.model.switches import Switches
from ptq4sam.prompts import GroundTruth
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.runs.calibration import calibration_pictures
from ptq4sam.sam.predictor import Predictor
from ptq4sam.studies.sensitivity import run as run_module
from ptq4sam.studies.sensitivity import study as study_module
from tests.families.efficientvit.conftest import TINY, TINY_VARIANT
from tests.tiny_runs import SCHEMES, run

NAME = "tiny_efficientvit"
LAYERS = ("stage1:1:1", "stage3:1:1", "stage4:1:1", "neck:3:0")
"""A fused, a depthwise, an attention's products, one of the neck."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    write_scenes(folder, 2, seed=0, split="train")
    write_scenes(folder, 2, seed=1, split="val")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sam = build_variant(NAME, TINY, folded=False)
        for module in sam.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=(1.5 / module.weight[0].numel()) ** 0.5)
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_var, 0.5, 2)
                nn.init.normal_(module.running_mean, std=0.3)
    torch.save(sam.state_dict(), folder / "tiny.pt")
    return folder


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(VARIANTS, NAME, TINY_VARIANT)
    monkeypatch.chdir(tmp_path)


def data(files: Path, split: str, prefix: str = "") -> list[str]:
    return [
        *(f"--{prefix}images", str(files / "images" / split)),
        *(f"--{prefix}annotations", str(files / "annotations" / f"{split}.json")),
    ]


def command(files: Path, work_dir: Path, *more: object) -> list[str]:
    options = [
        *("sensitivity", "--model", NAME, "--checkpoint", files / "tiny.pt"),
        *("--scheme", SCHEMES / "efficientvit_sam/study-int8.yaml", "--calibration-size", 2),
        *("--prompts", "ground-truth", "--best-in-multi-mask", *data(files, "val")),
        *data(files, "train", "calibration-"),
        *("--by", "layer", "--roles", "--alone", "--pictures", 2, "--work-dir", work_dir),
        *("--targets", *(f"any:{layer}" for layer in LAYERS), *more),
    ]
    return [str(option) for option in options]


def ious_by_hand(files: Path, layer: str | None) -> tuple[np.ndarray, np.ndarray]:
    """IoUs and areas of all objects, with one layer's quantizers on; None for the float model."""
    sam = load_sam(NAME, files / "tiny.pt", folded=False)

    def opened(split: str) -> CocoDataset:
        return CocoDataset(files / "images" / split, files / "annotations" / f"{split}.json")

    train, val = opened("train"), opened("val")
    items = calibration_pictures(sam, train, GroundTruth(train), 2, Prompting())
    scheme = Scheme.from_yaml(SCHEMES / "efficientvit_sam/study-int8.yaml")
    quantized = quantize_sam(sam, items, scheme)
    switches = Switches(quantized, sam)
    addressed = {
        name
        for name in switches.names
        if str(quantized.description.address_of(name.rpartition(".")[0])) == layer
    }
    ious, areas = [], []
    for record in val.images:
        objects = val.instances(record)
        boxes = np.array([item.box for item in objects], np.float32)
        predictor = Predictor(quantized)
        with torch.no_grad(), switches.only(addressed):
            embedding = predictor.embed(val.load(record))
            found = predictor.predict(boxes=boxes, multimask=True, embedding=embedding)
            best = found.iou_predictions.argmax(1)
            masks = predictor.binary_masks(found.low_res, embedding)[torch.arange(len(best)), best]
        for mask, item in zip(masks.numpy(), objects, strict=True):
            union = (mask | item.mask).sum()
            ious.append((mask & item.mask).sum() / union if union else 1.0)
            areas.append(item.area)
    return np.array(ious), np.array(areas)


def test_each_layer_alone_is_measured_by_size(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    published = LayerResult(0.611, 0.7, 0.6, 0.5, 0.25)
    first = f"EFFICIENTVIT:{LAYERS[1]}"
    monkeypatch.setattr(run_module, "layer_results", lambda _name: {first: published})
    run(*command(files, tmp_path / "s"))
    content: dict[str, Any] = json.loads((tmp_path / "s" / "sensitivity.json").read_text())
    targets = {target["name"]: target for target in content["targets"]}
    assert set(targets) == {f"EFFICIENTVIT:{layer}" for layer in LAYERS}
    for name, target in targets.items():
        assert target["all_but"] is None
        assert (target["published"] is None) == (name != first)
    assert targets[first]["published"]["mean_iou"] == 0.611
    ious, areas = ious_by_hand(files, LAYERS[1])
    found = targets[first]["only"]
    assert found["mean_iou"] == pytest.approx(ious.mean(), abs=1e-9)
    for size, chosen in (
        ("small", areas <= 1024),
        ("medium", (areas >= 1024) & (areas <= 9216)),
        ("large", areas >= 9216),
    ):
        value = found[f"mean_iou_{size}"]
        assert value is None if not chosen.any() else value == pytest.approx(ious[chosen].mean())
    exact, _ = ious_by_hand(files, None)
    assert content["float"]["mean_iou"] == pytest.approx(exact.mean(), abs=1e-9)
    assert not np.array_equal(ious, exact)
    # 16 channels inside; one filter each with a bias. The attention's products have no weights.
    hidden = TINY.widths[3] * TINY.expansions[3]
    assert targets[first]["megabytes_saved"] * 2**20 == hidden * (9 + 1)
    assert targets[f"EFFICIENTVIT:{LAYERS[2]}"]["megabytes_saved"] == 0
    lines = list(csv.DictReader((tmp_path / "s" / "sensitivity.csv").open()))
    assert {line["name"]: line["published.mean_iou"] for line in lines}[first] == "0.611"
    order = [target["only"]["mean_iou"] for target in content["targets"]]
    assert order == sorted(order)
    shown = capsys.readouterr().out
    assert "published" in shown
    assert "0.611" in shown
    run("report", tmp_path / "s")
    (page,) = (tmp_path / "s").glob("*.html")
    text = page.read_text()
    assert first in text
    assert "this part alone quantized. Loss" in text
    assert "alone: agreement" in text
    assert "all but: agreement" not in text


def test_it_goes_on_after_a_kill(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(*command(files, tmp_path / "whole"))
    seen: list[int] = []
    measure = study_module.Study._picture

    def failing(self: study_module.Study, *arguments: Any) -> Any:
        if len(seen) == 1:
            raise DataError("the power went")
        seen.append(0)
        return measure(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_module.Study, "_picture", failing)
        assert main(command(files, tmp_path / "cut")) == 2
    run(*command(files, tmp_path / "cut"), "--resume")
    both = [
        json.loads((tmp_path / name / "sensitivity.json").read_text()) for name in ("whole", "cut")
    ]
    assert both[0] == both[1]


def test_an_ap_of_each_is_not_measured(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(files, tmp_path / "s", "--metric", "AP")) == 2
    assert "the AP of each target alone is not measured" in capsys.readouterr().err
