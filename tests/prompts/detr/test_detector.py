from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ptq4sam.data import CocoDataset, ImageRecord
from ptq4sam.errors import CheckpointError
from ptq4sam.prompts import open_prompts
from ptq4sam.prompts.categories import COCO_CATEGORY_IDS
from ptq4sam.prompts.detr import detector
from ptq4sam.prompts.detr.detector import DETR_VARIANTS, DetrDetector, choose, prepare
from ptq4sam.prompts.detr.dino import DinoConfig, FocalNetDino
from ptq4sam.prompts.detr.focalnet import FocalNetConfig
from ptq4sam.prompts.detr.hdetr import HDetr, HDetrConfig
from tests.tiny_runs import Tiny, read_metrics, run

pytest_plugins = ("tests.tiny_fixtures",)

RECORD = ImageRecord(6, Path("a.jpg"), 90, 60)
_SIZES = {"dim": 64, "ffn": 48, "layers": 2, "heads": 4, "points": 2, "queries": 12}
_FOCAL = FocalNetConfig(dim=8, depths=(1, 1, 1, 1), focal_levels=2)
BUILD = {
    "hdetr": partial(HDetr, HDetrConfig(depths=(1, 1, 1, 1), training_queries=3, **_SIZES)),
    "focalnet-dino": partial(FocalNetDino, DinoConfig(backbone=_FOCAL, **_SIZES)),
}
KINDS = list(BUILD)
Saved = dict[str, tuple[Path, nn.Module]]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Detectors with few layers, on small pictures."""
    for kind, build in BUILD.items():
        monkeypatch.setitem(DETR_VARIANTS, kind, replace(DETR_VARIANTS[kind], build=build))
    monkeypatch.setattr(detector, "_SHORTER", 128)


def published(kind: str, model: nn.Module) -> dict[str, Tensor]:
    """The state under the authors' names, with a copy for each module that holds a head."""
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        head, _, tail = name.partition(".")
        if head not in ("class_embed", "bbox_embed"):
            state[name] = tensor
            continue
        places = [""] if kind == "hdetr" else [f"{layer}." for layer in range(_SIZES["layers"])]
        for place in places:
            state[f"{head}.{place}{tail}"] = tensor
            state[f"transformer.decoder.{head}.{place}{tail}"] = tensor
    if kind == "focalnet-dino":
        state["label_enc.weight"] = torch.zeros(92, _SIZES["dim"])
    return state


def _save(kind: str, path: Path) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BUILD[kind]().eval()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.normal_(0, 1.4 / weight[0].numel() ** 0.5)
    content = {"model": published(kind, model), "epoch": 3, "args": argparse.Namespace(lr=1.0)}
    torch.save(content, path)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """File and model of each kind."""
    folder = tmp_path_factory.mktemp("detr")
    return {kind: (folder / f"{kind}.pth", _save(kind, folder / f"{kind}.pth")) for kind in KINDS}


def _image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_are_the_best_pairs_of_query_and_coco_class(kind: str, saved: Saved) -> None:
    path, model = saved[kind]
    found = DetrDetector(kind, path, limit=40).prompts(RECORD, _image())
    with torch.no_grad():
        scores, boxes = (x[0].double().numpy() for x in model(prepare(_image())))
    pairs = [
        (1 / (1 + np.exp(-scores[query, id_])), id_, query)
        for query in range(len(scores))
        for id_ in COCO_CATEGORY_IDS
    ]
    expected = []
    for score, id_, query in sorted(pairs, key=lambda pair: -pair[0])[:40]:
        x, y, w, h = boxes[query] * [90, 60, 90, 60]
        box = np.clip([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 0, [90, 60, 90, 60])
        if box[2] > box[0] and box[3] > box[1]:
            expected.append((score, id_, *box))
    rows = np.array(expected)
    assert len(found) == len(rows) >= 20
    assert np.abs(found.scores - rows[:, 0]).max() < 1e-5
    assert np.abs(found.boxes - rows[:, 2:]).max() < 1e-3
    assert found.category_ids.tolist() == rows[:, 1].tolist()


def test_published_limits(saved: Saved) -> None:
    for kind, limit in (("hdetr", 100), ("focalnet-dino", 300)):
        source = DetrDetector(kind, saved[kind][0])
        assert source.limit == limit
        assert 0 < len(source.prompts(RECORD, _image())) <= limit


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_way(kind: str, saved: Saved, tiny: Tiny, elsewhere: Path) -> None:
    prompts = ["--prompts", f"{kind}:{saved[kind][0]}", "--max-per-image", "4"]
    run("evaluate", *tiny.model(), *tiny.data(), *prompts, "--work-dir", "w")
    metrics = read_metrics(elsewhere / "w")
    assert (metrics["pictures"], metrics["masks"]) == (3, 12)


def test_fingerprints_follow_kind_file_and_limit(scenes: CocoDataset, tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(b"not opened yet")
    (tmp_path / "b.pth").write_bytes(b"nor this")
    specs = (
        f"hdetr:{tmp_path}/a.pth",
        f"hdetr:{tmp_path}/b.pth",
        f"focalnet-dino:{tmp_path}/a.pth",
    )
    sources = [open_prompts(spec, scenes) for spec in specs]
    prints = {source.fingerprint() for source in sources}
    prints.add(DetrDetector("hdetr", tmp_path / "a.pth", limit=5).fingerprint())
    assert len(prints) == 4
    assert DetrDetector("hdetr", tmp_path / "a.pth").fingerprint() in prints
    assert [source.name for source in sources[1:]] == ["H-Deformable-DETR", "FocalNet-DINO"]


@pytest.mark.parametrize("kind", KINDS)
def test_unfit_weights(kind: str, saved: Saved, scenes: CocoDataset, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not there: detector .*none"):
        open_prompts(f"{kind}:{tmp_path}/none.pth", scenes)
    other = next(name for name in KINDS if name != kind)
    told = r"\.pth(: .* differs from its copy| is not of this detector, .* missing and )"
    with pytest.raises(CheckpointError, match=told):
        DetrDetector(kind, saved[other][0]).prompts(RECORD, _image())
    path, state = tmp_path / "x.pth", published(kind, saved[kind][1])
    eighty = {n: t[:80] if "class_embed" in n and "enc" not in n else t for n, t in state.items()}
    torch.save(eighty, path)
    with pytest.raises(CheckpointError, match=r"class_embed.*\[91, 64\].*\[80, 64\]"):
        DetrDetector(kind, path).prompts(RECORD, _image())


@pytest.mark.parametrize("size", [(1, 400), (400, 1), (3, 3)])
def test_odd_pictures(size: tuple[int, int], saved: Saved) -> None:
    record = ImageRecord(1, Path("b.jpg"), size[1], size[0])
    image = np.full((*size, 3), 200, np.uint8)
    found = DetrDetector("focalnet-dino", saved["focalnet-dino"][0]).prompts(record, image)
    assert (found.boxes <= [size[1], size[0]] * 2).all()


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (800, 1067)),
        ((640, 427), (1199, 800)),
        ((1000, 3000), (444, 1333)),
        ((1, 3000), (1, 1333)),
        ((800, 800), (800, 800)),
    ],
)
def test_pictures_are_scaled_as_published(
    size: tuple[int, int], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detector, "_SHORTER", 800)
    image = np.broadcast_to(np.array([0, 128, 255], np.uint8), (*size, 3))
    found = prepare(image)
    assert found.shape == (1, 3, *expected)
    colours = [(0 - 0.485 * 255) / 0.229, (128 - 0.456 * 255) / 0.224, (255 - 0.406 * 255) / 0.225]
    assert torch.allclose(found[0, :, -1, -1] * 255, torch.tensor(colours), atol=1e-2)


def test_what_is_no_number_drives_nothing_out() -> None:
    scores = torch.full((2, 91), -3.0)
    scores[0] = torch.nan
    scores[1, 12] = 9.0  # no category of COCO's
    scores[1, [90, 5]] = torch.tensor([2.0, 1.0])
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.4, 0.6, 0.2, 0.4]])
    found = choose(scores, boxes, 3)
    assert found[2][:2].tolist() == [90, 5]
    assert found[1].isfinite().all()
    assert torch.allclose(found[0][0], torch.tensor([0.3, 0.4, 0.5, 0.8]))
