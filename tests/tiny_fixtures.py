"""Five generated scenes of few objects, a small SAM with random weights, and it quantized.

A module that needs them says `pytest_plugins = ("tests.tiny_fixtures",)`: they are then made once
for all of them.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ptq4sam.data.scenes import write_scenes
from ptq4sam.families import VARIANTS, build_sam
from ptq4sam.families.family import Weights
from ptq4sam.families.sam_vit.variants import variant
from tests.model.conftest import TINY
from tests.tiny_runs import SMALL, Quantized, Tiny, read_metrics, run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    for count, seed, split in ((2, 0, "train"), (3, 1, "val")):
        _, annotations = write_scenes(folder, count, seed=seed, split=split)
        _keep_few_objects(annotations)
    checkpoint = folder / "random.safetensors"
    _write_weights(checkpoint, 0)
    return Tiny(folder, checkpoint)


def _write_weights(path: Path, seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_sam(SMALL)
        for parameter in model.parameters():
            # Zero-initialised tables would hide mistakes in the relative positions.
            torch.nn.init.normal_(parameter, std=0.15) if parameter.dim() > 1 else None
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)


@pytest.fixture(scope="session")
def _embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("embedded") / "vit_nano.safetensors"
    _write_weights(path, 1)
    return path


@pytest.fixture
def small_nano(_embedded: Path) -> Iterator[None]:
    """The embedded vit_nano is a small SAM with random weights, in this process."""
    with _small_nano(_embedded):
        yield


@pytest.fixture(scope="module")
def small_nano_in_module(_embedded: Path) -> Iterator[None]:
    """The same for all tests of a module, and for what they share."""
    with _small_nano(_embedded):
        yield


@contextlib.contextmanager
def _small_nano(weights: Path) -> Iterator[None]:
    # An absolute path is not looked for in the package.
    small = variant("vit_nano", TINY, Weights(str(weights)))
    with pytest.MonkeyPatch.context() as patch:
        own = VARIANTS["vit_nano"]
        patch.setitem(VARIANTS, "vit_nano", replace(small, everything=own.everything))
        yield


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
