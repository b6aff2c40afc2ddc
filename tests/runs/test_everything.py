"""`ptq4sam everything`: masks without prompts, of float and quantized models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from ptq4sam.cli import main
from ptq4sam.data import CocoDataset
from ptq4sam.families.checkpoint import load_sam
from tests.tiny_runs import Quantized, Tiny, run

pytest_plugins = ("tests.tiny_fixtures",)

# vit_nano was trained with boxes: of single points it is less sure than SAM.
OPTIONS = ["--options", "points_per_side=5", "pred_iou_thresh=0.3", "stability_score_thresh=0.1"]


def test_masks_of_a_folder_are_a_coco_data_set(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("everything", "--images", tiny.images(), "--limit", 2, "--out", tmp_path, *OPTIONS)
    dataset = CocoDataset(tiny.images(), tmp_path / "masks.json")
    assert [record.path.name for record in dataset.images] == ["000001.jpg", "000002.jpg"]
    content = json.loads((tmp_path / "masks.json").read_text())
    assert content["info"]["settings"]["points_per_side"] == 5
    masks = content["annotations"]
    assert f"{len(masks)} masks on 2 pictures" in capsys.readouterr().out
    assert {mask["image_id"] for mask in masks} == {1, 2}
    for mask in masks:
        assert mask["area"] == coco_mask.area(mask["segmentation"]) > 0
        assert mask["score"] == mask["predicted_iou"] > 0.3
        assert mask["stability_score"] >= 0.1
    for record in dataset.images:
        with Image.open(tmp_path / "pictures" / record.path.name) as picture:
            assert picture.size == (record.width, record.height)


def test_one_picture_and_a_quantized_model(
    tiny: Tiny, quantized: Quantized, tmp_path: Path
) -> None:
    picture = tiny.images() / "000003.jpg"
    keep_all = ["--options", "points_per_side=2", "pred_iou_thresh=0", "stability_score_thresh=0"]
    for name in ("first", "second"):
        run(
            *("everything", "--images", picture, "--checkpoint", quantized.path),
            *("--out", tmp_path / name, "--memory-budget", "8MiB", *keep_all),
        )
    first, second = ((tmp_path / name / "masks.json").read_bytes() for name in ("first", "second"))
    assert first == second
    assert len(json.loads(first)["annotations"]) >= 1
    assert json.loads(first)["images"] == [
        {"id": 1, "file_name": "000003.jpg", "width": 320, "height": 256}
    ]


@pytest.mark.parametrize("quantize", [False, True], ids=["float", "quantized"])
def test_a_sparse_grid_first(
    tiny: Tiny,
    quantized: Quantized,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    quantize: bool,
) -> None:
    """With everything confident, only the sparse grid's four points of 16 are asked."""
    model = ["--checkpoint", quantized.path] if quantize else []
    few = ["points_per_side=4", "pred_iou_thresh=0", "stability_score_thresh=0"]
    asked = ["everything", "--images", tiny.images(), "--limit", 1, *model, "--hierarchical"]
    for threshold, points in ((-1000.0, 4), (1000.0, 16)):
        options = ["hierarchical.coarser=2", f"hierarchical.high_score_thresh={threshold}"]
        run(*asked, "--out", tmp_path, "--options", *few, *options)
        assert f"{points} points, {3 * points} masks proposed" in capsys.readouterr().out
        content = json.loads((tmp_path / "masks.json").read_text())
        assert content["info"]["settings"]["hierarchical"]["high_score_thresh"] == threshold


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (["--options", "points=3"], "known are points_per_side"),
        (["--options", "hierarchical.batch=3"], "given without --hierarchical: add it"),
        (["--hierarchical", "--options", "hierarchical.bach=3"], "did you mean 'batch'"),
        (["--images", "nowhere"], "not there: pictures nowhere"),
        (["--limit", "0"], "1 or more"),
        (["--device", "tpu9"], "asked for device"),
    ],
)
def test_bad_requests(
    tiny: Tiny, tmp_path: Path, given: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["everything", "--images", str(tiny.images()), "--out", str(tmp_path / "o"), *given]
    assert main(asked) == 2
    assert problem in " ".join(capsys.readouterr().err.split())


def test_a_quantized_model_has_one_name(
    tiny: Tiny, quantized: Quantized, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["everything", "--images", str(tiny.images()), "--out", str(tmp_path)]
    assert main([*asked, "--checkpoint", str(quantized.path), "--model", "vit_b"]) == 2
    assert "is a quantized vit_nano" in " ".join(capsys.readouterr().err.split())


def test_damaged_pictures_are_left_out(tiny: Tiny, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for path in sorted(tiny.images().iterdir())[:2]:
        content = path.read_bytes()
        (images / path.name).write_bytes(content[:900] if path.stem == "000001" else content)
    few = ["--options", "points_per_side=1"]
    run("everything", "--images", images, "--out", tmp_path / "o", "--skip-bad", *few)
    content = json.loads((tmp_path / "o" / "masks.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["000002.jpg"]
    assert {path.name for path in (tmp_path / "o" / "pictures").iterdir()} == {"000002.jpg"}


def test_the_embedded_model_finds_objects_without_prompts() -> None:
    """With truth at hand: most of the large objects of a scene are among the masks."""
    import numpy as np

    from ptq4sam.data.scenes import generate_scene
    from ptq4sam.everything import EverythingSettings, MaskGenerator
    from ptq4sam.sam.predictor import Predictor

    scene = generate_scene(4)
    settings = EverythingSettings(
        points_per_side=12, pred_iou_thresh=0.25, stability_score_thresh=0.05
    )
    found = MaskGenerator(Predictor(load_sam("vit_nano")), settings).generate(scene.image)
    masks = np.stack([found.mask(place) for place in range(len(found))])
    best = []
    for instance in scene.instances:
        if instance.mask.sum() > 1000:
            union = np.count_nonzero(masks | instance.mask, axis=(1, 2))
            both = np.count_nonzero(masks & instance.mask, axis=(1, 2))
            best.append(float((both / union).max()))
    assert len(best) >= 5
    assert np.median(best) > 0.5, best
