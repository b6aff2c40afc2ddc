"""Data as people have them: boxes without masks, pictures in subfolders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ptq4sam.data import CocoDataset
from ptq4sam.prompts import GroundTruth
from tests.tiny_runs import SCHEMES, Tiny, read_metrics, refusal, run

pytest_plugins = ("tests.tiny_fixtures",)

# Nothing is written beside the repository.
pytestmark = pytest.mark.usefixtures("elsewhere")


def test_boxes_alone_are_enough_to_calibrate_and_not_to_score(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads(tiny.annotations("train").read_text())
    for annotation in content["annotations"]:
        annotation["segmentation"] = []
    Path("boxes.json").write_text(json.dumps(content))
    scheme = ["--scheme", SCHEMES / "ptq4sam-s66.yaml", "--calibration-size", 2]
    data = ["--calibration-images", tiny.images("train"), "--calibration-annotations", "boxes.json"]
    run("quantize", *tiny.model(), *scheme, *data, "--output", "q.safetensors", "--dry-run")
    assert "2 pictures" in capsys.readouterr().out
    boxed = CocoDataset(tiny.images("train"), "boxes.json", masks=False)
    masked = CocoDataset(tiny.images("train"), tiny.annotations("train"))
    for one, other in zip(boxed.images, masked.images, strict=True):
        pixels = boxed.load(one)
        boxes = [
            GroundTruth(d).prompts(r, pixels).boxes for d, r in ((boxed, one), (masked, other))
        ]
        assert len(boxes[0]) > 0
        assert (boxes[0] == boxes[1]).all()
    scored = ["--images", tiny.images("train"), "--annotations", "boxes.json"]
    told = refusal(capsys, "evaluate", *tiny.model(), *scored)
    assert "there is no segmentation, which scores need" in told


def test_pictures_in_subfolders(tiny: Tiny) -> None:
    for name in ("000001.jpg", "000002.jpg"):
        folder = Path("images") / name[5]
        folder.mkdir(parents=True)
        shutil.copy(tiny.images() / name, folder / "same.jpg")
    quick = ["--options", "points_per_side=2", "pred_iou_thresh=0", "stability_score_thresh=0"]
    run("everything", "--images", "images", "--recursive", *tiny.model(), "--out", "o", *quick)
    names = [image["file_name"] for image in json.loads(Path("o/masks.json").read_text())["images"]]
    assert names == ["1/same.jpg", "2/same.jpg"]
    dataset = CocoDataset("images", "o/masks.json")
    assert [record.path.parent.name for record in dataset.images] == ["1", "2"]
    assert len(list(Path("o/pictures").iterdir())) == 2

    boxes = ["--detector", "scene-detector", "--images", "images", "--recursive"]
    run("prompts", *boxes, "--out", "boxes.json")
    assert {result["image_id"] for result in json.loads(Path("boxes.json").read_text())} == {1, 2}
    asked = ["evaluate", *tiny.model(), "--images", "images", "--prompts", "boxes.json"]
    run(*asked, "--recursive", "--limit", 2, "--work-dir", "w")
    assert read_metrics(Path("w"))["pictures"] == 2
