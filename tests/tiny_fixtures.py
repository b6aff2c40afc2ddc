"""Five generated scenes of few objects, a vit_nano with random weights, and the same one quantized.

A module that needs them says `pytest_plugins = ("tests.tiny_fixtures",)`: they are then made once
for all of them.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ptq4sam.data.scenes import write_scenes
from ptq4sam.families import build_sam
from tests.tiny_runs import Quantized, Tiny, read_metrics, run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    for count, seed, split in ((2, 0, "train"), (3, 1, "val")):
        _, annotations = write_scenes(folder, count, seed=seed, split=split)
        _keep_few_objects(annotations)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = build_sam("vit_nano").state_dict()
    checkpoint = folder / "random.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, checkpoint)
    return Tiny(folder, checkpoint)


@pytest.fixture(scope="session")
def quantized(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """PTQ4SAM-S at 4 bits, evaluated with annotated boxes."""
    work_dir = tmp_path_factory.mktemp("quantized")
    path = work_dir / "w4a4.safetensors"
    scheme = tiny.scheme("ptq4sam-s44")
    run("quantize", *tiny.model(), *tiny.data(), *scheme, "--output", path, "--work-dir", work_dir)
    return Quantized(path, work_dir, read_metrics(work_dir))


def _keep_few_objects(annotations: Path) -> None:
    """Forget all but four objects of a picture: a decoder's work grows with their boxes."""
    content = json.loads(annotations.read_text(encoding="utf-8"))
    seen: Counter[int] = Counter()
    few = []
    for one in content["annotations"]:
        seen[one["image_id"]] += 1
        if seen[one["image_id"]] <= 4:
            few.append(one)
    annotations.write_text(json.dumps({**content, "annotations": few}), encoding="utf-8")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder: detections are kept in work_dirs/ below it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
