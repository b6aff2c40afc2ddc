"""YOLOX-L, Faster R-CNN and DINO as mmdetection builds them, with random weights."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ptq4sam.data import CocoDataset, ImageRecord
from ptq4sam.errors import CheckpointError, ConfigError, DependencyError
from ptq4sam.prompts import MmdetDetector, open_prompts
from ptq4sam.prompts.categories import COCO_CATEGORY_IDS
from ptq4sam.prompts.mmdet_checkpoint import load_weights
from ptq4sam.prompts.mmdet_detector import build_detector
from tests.mmdet_models import CONFIGS, FASTER_RCNN, YOLOX_L, random_detector, require_mmdet

YOLOX_NANO = CONFIGS / "yolox" / "yolox_nano_8x8_300e_coco.py"
DINO_R50 = CONFIGS / "dino" / "dino_4scale_r50_8x2_12e_coco.py"
DINO_SWIN_L = CONFIGS / "dino" / "dino_5scale_swin-l_8x2_12e_coco.py"


@pytest.fixture(scope="module", autouse=True)
def _mmdet() -> None:
    require_mmdet()


def _write(model: Any, path: Path) -> Path:
    """A checkpoint as mmengine writes it, with its training history."""
    from mmengine.logging import HistoryBuffer, MessageHub
    from mmengine.runner import save_checkpoint

    hub = MessageHub("history")
    hub.update_scalar("train/loss", 0.5)
    hub.update_info("iter", 7)
    assert isinstance(hub.get_scalar("train/loss"), HistoryBuffer)
    meta = {"epoch": 1, "dataset_meta": {"classes": ("person",)}, "cfg": "model = dict()"}
    content = {"meta": meta, "state_dict": model.state_dict(), "message_hub": hub.state_dict()}
    save_checkpoint(content, str(path))
    return path


def _picture(height: int, width: int) -> tuple[ImageRecord, NDArray[np.uint8]]:
    image = np.random.default_rng(7).integers(0, 256, (height, width, 3), np.uint8)
    return ImageRecord(1, Path("a.jpg"), width, height), image


@pytest.mark.parametrize(
    ("config", "limit"),
    [(YOLOX_L, None), (FASTER_RCNN, 100), (DINO_R50, 300)],
    ids=["yolox_l", "faster_rcnn", "dino_r50"],
)
def test_boxes_are_those_of_mmdetections_own_inference(
    tmp_path: Path, config: Path, limit: int | None
) -> None:
    """A flat picture, since these scale its shorter side to at most 800 pixels."""
    from mmdet.apis import inference_detector

    record, image = _picture(24, 160)
    model = random_detector(config)
    source = MmdetDetector(config, _write(model, tmp_path / "a.pth"))
    expected = inference_detector(model, image[..., ::-1].copy()).pred_instances
    found = source.prompts(record, image)
    assert len(found) > 20
    assert len(set(found.category_ids.tolist())) > 1
    inside = expected.bboxes.clamp(min=0)
    inside = torch.minimum(inside, torch.tensor([160.0, 24.0, 160.0, 24.0])).numpy()
    usable = np.flatnonzero((inside[:, 2:] > inside[:, :2]).all(1))
    order = usable[np.argsort(-expected.scores.numpy()[usable], kind="stable")][:limit]
    assert len(found) == len(order)
    assert np.allclose(found.boxes, inside[order], atol=1e-4)
    assert np.allclose(found.scores, expected.scores.numpy()[order], atol=1e-4)
    ids = np.array(COCO_CATEGORY_IDS)[expected.labels.numpy()[order]]
    assert found.category_ids.tolist() == ids.tolist()


@pytest.mark.parametrize(
    ("config", "resized", "padded", "swap", "mean"),
    [
        (YOLOX_L, (480, 640), (640, 640), False, None),
        (FASTER_RCNN, (800, 1067), (800, 1088), True, [123.675, 116.28, 103.53]),
        (DINO_R50, (800, 1067), (800, 1067), True, [123.675, 116.28, 103.53]),
        (DINO_SWIN_L, (800, 1067), (800, 1067), True, [123.675, 116.28, 103.53]),
    ],
    ids=["yolox_l", "faster_rcnn", "dino_r50", "dino_swin_l"],
)
def test_pipelines_are_the_published_ones(
    config: Path,
    resized: tuple[int, int],
    padded: tuple[int, int],
    swap: bool,
    mean: list[float] | None,
) -> None:
    from mmcv.transforms import Compose
    from mmdet.registry import MODELS
    from mmdet.utils import get_test_pipeline_cfg
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    settings = Config.fromfile(str(config))
    init_default_scope("mmdet")
    pipeline = get_test_pipeline_cfg(settings)
    pipeline[0].type = "mmdet.LoadImageFromNDArray"
    prepare = MODELS.build(settings.model.data_preprocessor)
    image = np.full((480, 640, 3), (10, 20, 30), np.uint8)
    packed = Compose(pipeline)({"img": image, "img_id": 0})
    batch = prepare({"inputs": [packed["inputs"]], "data_samples": [packed["data_samples"]]})
    sample, pixels = batch["data_samples"][0], batch["inputs"]
    assert sample.img_shape[:2] == (padded if config == YOLOX_L else resized)
    assert tuple(pixels.shape[2:]) == padded
    assert prepare._channel_conversion is swap
    corner = pixels[0, :, 5, 5].tolist()
    if mean is None:
        assert corner == [10, 20, 30]
        assert (pixels[0, :, 500:] == 114).all()
    else:
        std = [58.395, 57.12, 57.375]
        assert np.allclose(corner, (np.array([30, 20, 10]) - mean) / std, atol=1e-4)
    test = settings.model.test_cfg
    if config == YOLOX_L:
        assert (test.score_thr, test.nms.iou_threshold, test.max_per_img) == (0.05, 0.65, -1)
    elif config == FASTER_RCNN:
        assert (test.rcnn.score_thr, test.rcnn.nms.iou_threshold) == (0.05, 0.5)
        assert test.rcnn.max_per_img == 100
    else:
        assert test.max_per_img == 300


def test_dino_with_swin_l_takes_exactly_its_names(tmp_path: Path) -> None:
    """On no device, for it has 218 million parameters."""
    model = build_detector(DINO_SWIN_L, "meta")
    state = model.state_dict()
    assert sum(parameter.numel() for parameter in model.parameters()) // 10**6 == 218
    path = _write(model, tmp_path / "a.pth")
    load_weights(model, path, "swin-l")
    state.pop("level_embed")
    torch.save({"state_dict": state}, path)
    with pytest.raises(CheckpointError, match=r"swin-l: missing 1 parameters \(level_embed\)"):
        load_weights(model, path, "swin-l")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*/*.py")), ids=lambda path: path.stem)
def test_every_configuration_points_at_one_of_mmdets(path: Path) -> None:
    from mmengine.config import Config

    settings = Config.fromfile(str(path))
    kind = {"yolox": "YOLOX", "faster_rcnn": "FasterRCNN", "dino": "DINO"}[path.parent.name]
    assert settings.model.type == kind
    assert settings.test_dataloader.dataset.pipeline[0].type == "LoadImageFromFile"


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the smallest model."""
    return _write(random_detector(YOLOX_NANO), tmp_path_factory.mktemp("nano") / "nano.pth")


def _variant(path: Path, text: str) -> Path:
    path.write_text(f"_base_ = {str(YOLOX_NANO)!r}\n{text}\n", encoding="utf-8")
    return path


def test_spec_configurations_of_mmdet_and_limit(scenes: CocoDataset, nano: Path) -> None:
    record, image = _picture(120, 160)
    ours = open_prompts(f"mmdet:{YOLOX_NANO}:{nano}", scenes).prompts(record, image)
    # As published: in any number.
    assert len(ours) > 100
    assert (np.diff(ours.scores) <= 0).all()
    assert ours.scores[-1] > 0.05
    theirs = open_prompts(f"mmdet:yolox/yolox_nano_8xb8-300e_coco.py:{nano}", scenes)
    # mmdet's own sets no number: it is COCO's.
    assert np.array_equal(theirs.prompts(record, image).boxes, ours.first(100).boxes)
    assert len(MmdetDetector(YOLOX_NANO, nano, limit=7).prompts(record, image)) == 7


def test_red_and_blue_are_where_they_belong(nano: Path) -> None:
    record, image = _picture(120, 160)
    source = MmdetDetector(YOLOX_NANO, nano)
    assert not np.array_equal(
        source.prompts(record, image).scores,
        source.prompts(record, image[..., ::-1].copy()).scores,
    )


def test_a_picture_without_boxes(tmp_path: Path, nano: Path) -> None:
    config = _variant(tmp_path / "sure.py", "model = dict(test_cfg=dict(score_thr=1.1))")
    found = MmdetDetector(config, nano).prompts(*_picture(120, 160))
    assert found.boxes.shape == (0, 4)


def test_eighty_categories_of_another_data_set(nano: Path) -> None:
    found = MmdetDetector(YOLOX_NANO, nano, range(101, 181)).prompts(*_picture(120, 160))
    assert len(found.category_ids) > 0
    assert set(found.category_ids.tolist()) <= set(range(101, 181))


def test_other_numbers_of_classes(tmp_path: Path) -> None:
    config = _variant(tmp_path / "four.py", "model = dict(bbox_head=dict(num_classes=4))")
    path = _write(random_detector(config), tmp_path / "a.pth")
    found = MmdetDetector(config, path, [2, 4, 8, 16]).prompts(*_picture(120, 160))
    assert set(found.category_ids.tolist()) <= {2, 4, 8, 16}
    config = _variant(tmp_path / "coco.py", "model = dict(bbox_head=dict(num_classes=91))")
    path = _write(random_detector(config), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="knows 91 classes, the data set 80 categories"):
        MmdetDetector(config, path, COCO_CATEGORY_IDS).prompts(*_picture(120, 160))


def test_fingerprints_follow_configuration_weights_and_settings(tmp_path: Path, nano: Path) -> None:
    def source(config: Path, **more: Any) -> str:
        return MmdetDetector(config, more.pop("checkpoint", nano), **more).fingerprint()

    base = tmp_path / "base.py"
    child = tmp_path / "child.py"
    child.write_text("_base_ = ['base.py', 'child.py']\n", encoding="utf-8")
    base.write_text("a = 1\n", encoding="utf-8")
    prints = [source(YOLOX_NANO), source(YOLOX_L), source(child)]
    base.write_text("a = 2\n", encoding="utf-8")
    prints += [source(child), source(child, limit=3), source(child, category_ids=[1])]
    other = tmp_path / "other.pth"
    other.write_bytes(b"other")
    prints.append(source(child, checkpoint=other))
    assert len(set(prints)) == len(prints)
    assert source(child) in prints


def test_wrong_files_are_one_line_that_names_them(tmp_path: Path, nano: Path) -> None:
    with pytest.raises(ConfigError, match=r"no configuration yolox/yolox_l\.py.*did you mean yolo"):
        MmdetDetector("yolox/yolox_l.py", nano)
    with pytest.raises(CheckpointError, match=r"not there: detector .*none\.pth"):
        MmdetDetector(YOLOX_NANO, tmp_path / "none.pth")
    broken = tmp_path / "broken.py"
    broken.write_text("model = dict(\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"broken\.py is not Python"):
        MmdetDetector(broken, nano)
    for text in ("x = 1", "model = dict(type='Unknown', backbone=dict())", "x = missing"):
        broken.write_text(text + "\n", encoding="utf-8")
        with pytest.raises(ConfigError, match=r"broken\.py describes no detector") as caught:
            MmdetDetector(broken, nano).prompts(*_picture(60, 80))
        assert "\n" not in str(caught.value)
    tiny = CONFIGS / "yolox" / "yolox_tiny_8x8_300e_coco.py"
    with pytest.raises(CheckpointError, match=r"nano\.pth does not fit yolox_tiny_.*: "):
        MmdetDetector(tiny, nano).prompts(*_picture(60, 80))


def test_without_mmdetection_the_way_to_it_is_named(
    nano: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = MmdetDetector(YOLOX_NANO, nano)
    loaded = [name for name in sys.modules if name.partition(".")[0] in ("mmdet", "mmcv")]
    for name in loaded:
        monkeypatch.delitem(sys.modules, name)
    original = builtins.__import__

    def without_operators(name: str, *more: Any, **named: Any) -> Any:
        if name.startswith("mmdet"):
            raise ModuleNotFoundError("No module named 'mmcv._ext'")
        return original(name, *more, **named)

    monkeypatch.setattr(builtins, "__import__", without_operators)
    with pytest.raises(DependencyError, match=r"\(No module named 'mmcv._ext'\).*sh mmdet"):
        source.prompts(*_picture(60, 80))
