from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ptq4sam.data import ImageRecord
from ptq4sam.data.scenes import SCENE_CATEGORIES
from ptq4sam.errors import CheckpointError, DependencyError
from ptq4sam.prompts import TransformersDetector
from tests import tiny_detectors
from tests.tiny_runs import Tiny, read_metrics, run

pytest.importorskip("transformers")

pytest_plugins = ("tests.tiny_fixtures",)

RECORD = ImageRecord(6, Path("a.jpg"), 90, 60)
LABELS = ("cat", "dog", "car")
CATEGORIES = {3: "car", 8: "cat"}


def _image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("d_fine")
    tiny_detectors.save("d_fine", path, LABELS)
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@torch.no_grad()
def _own(model: Any, kind: str, threshold: float) -> list[tuple[float, ...]]:
    """Category, score and box as the library itself finds them, best first."""
    processor = tiny_detectors.processor(kind)
    image = _image()
    output = model(**processor(images=image, return_tensors="pt"))
    (found,) = processor.post_process_object_detection(
        output, threshold=threshold, target_sizes=torch.tensor([image.shape[:2]])
    )
    ids = {0: 8, 2: 3}
    rows = [
        (ids[int(label)], float(score), *np.clip(box.numpy(), 0, [90, 60, 90, 60]))
        for score, label, box in zip(
            *(found[k] for k in ("scores", "labels", "boxes")), strict=True
        )
        if int(label) in ids
    ]
    rows = [row for row in rows if row[4] > row[2] and row[5] > row[3]]
    return sorted(rows, key=lambda row: -row[1])


@pytest.mark.parametrize("kind", tiny_detectors.KINDS)
def test_boxes_are_those_of_the_library(kind: str, tmp_path: Path) -> None:
    model = tiny_detectors.save(kind, tmp_path, LABELS)
    source = TransformersDetector(str(tmp_path), CATEGORIES, score_threshold=0.0)
    found = source.prompts(RECORD, _image())
    own = np.array(_own(model, kind, 0.0))
    assert len(found) == len(own) >= 5
    assert found.category_ids.tolist() == own[:, 0].tolist()
    assert np.abs(found.scores - own[:, 1]).max() < 1e-4
    assert np.abs(found.boxes - own[:, 2:]).max() < 1e-4
    assert len(np.unique(found.boxes.round(2), axis=0)) >= 5
    median = float(np.median(found.scores))
    few = TransformersDetector(str(tmp_path), CATEGORIES, score_threshold=median, limit=3)
    sure = few.prompts(RECORD, _image())
    assert 1 <= len(sure) <= 3
    assert (sure.scores > median).all()


@pytest.mark.parametrize("kind", ["detr", "rt_detr_v2"])
def test_the_whole_way(kind: str, tiny: Tiny, elsewhere: Path) -> None:
    tiny_detectors.save(kind, elsewhere / "detector", SCENE_CATEGORIES)
    prompts = ["--prompts", f"transformers:{elsewhere}/detector", "--max-per-image", "5"]
    run("evaluate", *tiny.model(), *tiny.data(), *prompts, "--work-dir", elsewhere / "w")
    metrics = read_metrics(elsewhere / "w")
    assert (metrics["pictures"], metrics["masks"]) == (3, 15)


def test_a_picture_of_three_rows(folder: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (3, 90, 3), np.uint8)
    record = ImageRecord(1, Path("b.jpg"), 90, 3)
    found = TransformersDetector(str(folder), CATEGORIES).prompts(record, image)
    assert (found.boxes <= [90, 3, 90, 3]).all()


def test_fingerprints_follow_files_and_settings(copy: Path) -> None:
    def fingerprint(**settings: float) -> str:
        return TransformersDetector(str(copy), CATEGORIES, **settings).fingerprint()

    prints = {fingerprint(), fingerprint(), fingerprint(score_threshold=0.5)}
    prints.add(fingerprint(limit=5))
    prints.add(TransformersDetector(str(copy), {8: "cat"}).fingerprint())
    processor = copy / "preprocessor_config.json"
    processor.write_text(processor.read_text().replace("128", "96"))
    prints.add(fingerprint())
    assert len(prints) == 5


def test_a_name_is_looked_for_in_the_cache_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"no such folder.*hf download nobody/nothing"):
        TransformersDetector("nobody/nothing", CATEGORIES)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    for path in (f"{tmp_path}/none", "./none", "here/none", "~/none", "a/b/c", "not a name"):
        with pytest.raises(CheckpointError, match=r"no such folder: give a folder that") as caught:
            TransformersDetector(path, CATEGORIES)
        assert "hf download" not in str(caught.value)
    commit = "0" * 40
    repository = tmp_path / "models--me--mine"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    named = TransformersDetector("me/mine", CATEGORIES)
    here = TransformersDetector(str(folder), CATEGORIES)
    assert named.fingerprint() == here.fingerprint()
    assert np.array_equal(
        named.prompts(RECORD, _image()).boxes, here.prompts(RECORD, _image()).boxes
    )


def test_folders_that_hold_no_detector(copy: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        TransformersDetector(str(empty), CATEGORIES)
    (empty / "config.json").write_text('{"model_type": "no-such-model"}')
    _refused(empty, "holds no detector")
    weights = copy / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:5000])
    _refused(copy, "holds no detector")
    weights.unlink()
    torch.save({"weight": torch.zeros(3)}, copy / "pytorch_model.bin")
    _refused(copy, "holds no detector .* from safetensors")


def test_absent_tensors_are_not_made_up(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(copy / "model.safetensors")
    name = sorted(state)[0]
    del state[name]
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    _refused(copy, "1 tensors of the detector are missing")


def test_a_detector_of_other_things(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="finds cat, dog, car, the data set has circle"):
        TransformersDetector(str(folder), {1: "circle"}).prompts(RECORD, _image())


def test_without_the_library(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(DependencyError, match=r"pip install 'ptq4sam\[transformers\]'"):
        TransformersDetector(str(folder), CATEGORIES)


def _refused(folder: Path, told: str) -> None:
    with pytest.raises(CheckpointError, match=told) as caught:
        TransformersDetector(str(folder), CATEGORIES).prompts(RECORD, _image())
    assert "\n" not in str(caught.value)
