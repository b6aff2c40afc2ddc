from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision.ops import box_iou

from ptq4sam.data.scenes import generate_scene
from ptq4sam.errors import CheckpointError
from ptq4sam.prompts.scene_detector import (
    SCENE_DETECTOR_WEIGHTS,
    SceneDetector,
    build_scene_detector,
    fold_batch_norms,
)


@pytest.fixture(scope="module")
def detector() -> SceneDetector:
    return SceneDetector()


def test_shipped_weights_are_small_and_half_precision() -> None:
    assert SCENE_DETECTOR_WEIGHTS.stat().st_size < 8e6
    assert {value.dtype for value in load_file(SCENE_DETECTOR_WEIGHTS).values()} == {torch.float16}


def test_most_objects_are_found_with_their_category(detector: SceneDetector) -> None:
    found, right, total = 0, 0, 0
    for seed in range(9000, 9015):
        scene = generate_scene(seed)
        boxes, scores, categories = detector.detect(scene.image)
        assert (np.diff(scores) <= 0).all()
        kept = scores > 0.3
        overlap = box_iou(
            torch.tensor(np.array([item.box for item in scene.instances])),
            torch.from_numpy(boxes[kept]),
        )
        best, index = overlap.max(dim=1)
        truth = np.array([item.category + 1 for item in scene.instances])
        matched = best.numpy() > 0.6
        found += int(matched.sum())
        right += int((matched & (categories[kept][index.numpy()] == truth)).sum())
        total += len(truth)
    assert found / total > 0.7
    assert right / found > 0.7


def test_boxes_are_in_the_pixels_of_the_image(detector: SceneDetector) -> None:
    """A larger copy of an image gives the same boxes, larger, and none outside of the image."""
    image = generate_scene(9001).image
    small, scores, _ = detector.detect(image)
    large, _, _ = detector.detect(image.repeat(3, axis=0).repeat(3, axis=1))
    sure = torch.from_numpy(small[scores > 0.6])
    assert len(sure) > 3
    best = box_iou(sure, torch.from_numpy(large) / 3).max(dim=1).values
    assert (best > 0.8).float().mean() > 0.8
    assert large.min() >= 0
    assert large[:, [0, 2]].max() <= 3 * image.shape[1]
    assert large[:, [1, 3]].max() <= 3 * image.shape[0]


def test_detections_are_repeatable_and_typed(detector: SceneDetector) -> None:
    image = generate_scene(9002).image
    first, again = detector.detect(image), SceneDetector().detect(image)
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(a, b)
    boxes, scores, categories = first
    assert (boxes.dtype, scores.dtype, categories.dtype) == (np.float32, np.float32, np.int64)
    assert boxes.shape == (len(scores), 4)
    assert ((boxes[:, 2:] - boxes[:, :2]) > 0).all()


def test_prompts_carry_the_image_id(detector: SceneDetector) -> None:
    data = pytest.importorskip("ptq4sam.data")
    scene = generate_scene(9003)
    record = data.ImageRecord(id=17, path=Path("scene.jpg"), width=320, height=256)
    prompts = detector.prompts(record, scene.image)
    assert prompts.image_id == 17
    assert len(prompts.boxes) == len(prompts.scores) == len(prompts.category_ids) > 0


def test_the_threshold_drops_detections_and_changes_the_fingerprint(
    detector: SceneDetector,
) -> None:
    image = generate_scene(9004).image
    strict = SceneDetector(score_threshold=0.7)
    assert len(strict.detect(image)[1]) < len(detector.detect(image)[1])
    assert strict.detect(image)[1].min() >= 0.7
    assert strict.fingerprint() != detector.fingerprint()
    assert SceneDetector().fingerprint() == detector.fingerprint()


def test_the_fingerprint_follows_the_weights(detector: SceneDetector, tmp_path: Path) -> None:
    weights = load_file(SCENE_DETECTOR_WEIGHTS)
    weights["roi_heads.box_predictor.cls_score.bias"] += 1.0
    path = tmp_path / "other.safetensors"
    save_file(weights, path)
    assert SceneDetector(path).fingerprint() != detector.fingerprint()


def test_unusable_weights_give_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weight file"):
        SceneDetector(tmp_path / "absent.safetensors")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(SCENE_DETECTOR_WEIGHTS.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="does not hold") as caught:
        SceneDetector(damaged)
    assert "\n" not in str(caught.value)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(3)}, foreign)
    with pytest.raises(CheckpointError, match="does not hold"):
        SceneDetector(foreign)


def test_folding_batch_norms_keeps_the_function() -> None:
    torch.manual_seed(0)
    model = build_scene_detector(folded=False)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias)
            torch.nn.init.normal_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
    image = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        before = model.eval().backbone(image)
        fold_batch_norms(model)
        after = model.backbone(image)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    assert set(model.state_dict()) == set(build_scene_detector().state_dict())
    assert list(before) == list(after) == ["0", "1", "2", "3"]
    for level, features in before.items():
        largest = features.abs().max()
        assert (features - after[level]).abs().max() < 1e-5 * largest


def test_a_training_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "tools" / "train_scene_detector.py"
    specification = importlib.util.spec_from_file_location("train_scene_detector", script)
    assert specification is not None
    assert specification.loader is not None
    trainer = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(trainer)

    def train(folder: str, *extra: str) -> dict[str, torch.Tensor] | None:
        (tmp_path / folder).mkdir(exist_ok=True)
        flags = ["--out", str(tmp_path / folder), "--steps", "2", "--batch-size", "1", *extra]
        model = trainer.train(trainer.parse_arguments(flags))
        return None if model is None else model.state_dict()

    whole = train("whole")
    assert train("parts", "--time-limit", "0") is None
    resumed = train("parts")
    assert whole is not None
    assert resumed is not None
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
    initial = trainer.build_scene_detector(folded=False).state_dict()
    key = "roi_heads.box_predictor.cls_score.weight"
    assert not torch.equal(initial[key], whole[key])
