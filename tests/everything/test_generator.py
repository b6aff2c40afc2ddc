"""Automatic masks, against segment-anything's generator with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import nn

from ptq4sam.errors import ConfigError, DataError
from ptq4sam.everything import EverythingSettings, FoundMasks, MaskGenerator
from ptq4sam.sam.model import Sam
from ptq4sam.sam.predictor import Predictor

Models = Callable[[str], tuple[Sam, nn.Module]]

# Masks of random weights have boxes of nearly the whole picture: suppression would leave one.
_KEEP_ALL = {"box_nms_thresh": 1.0, "crop_nms_thresh": 1.0}
_CROPS = {"crop_n_layers": 1, "crop_n_points_downscale_factor": 2}


def same_masks(ours: FoundMasks, theirs: list[dict[str, Any]]) -> None:
    """All records equal, in any order of equal scores."""
    assert len(ours) == len(theirs)
    found = ours.to_annotations()
    for record, place in zip(found, range(len(found)), strict=True):
        record["segmentation"] = ours.mask(place)

    def key(record: dict[str, Any]) -> tuple[Any, ...]:
        point = np.round(record["point_coords"][0], 6).tolist()
        return (*record["crop_box"], *point, round(record["predicted_iou"], 4))

    for mine, other in zip(sorted(found, key=key), sorted(theirs, key=key), strict=True):
        assert mine.keys() == other.keys()
        assert mine["crop_box"] == other["crop_box"]
        assert np.allclose(mine["point_coords"], other["point_coords"])
        assert mine["predicted_iou"] == pytest.approx(other["predicted_iou"], abs=1e-4)
        # Logits near zero, or near the stability score's offsets, may fall to either side.
        pixels = 3 / max(other["area"], 1)
        stability = pytest.approx(other["stability_score"], abs=max(1e-3, pixels))
        assert mine["stability_score"] == stability
        assert np.count_nonzero(mine["segmentation"] != other["segmentation"]) <= 3
        assert np.abs(np.subtract(mine["bbox"], other["bbox"])).max() <= 1
        assert abs(mine["area"] - other["area"]) <= 3


@pytest.mark.parametrize("crops", [{}, _CROPS], ids=["whole", "crops"])
@pytest.mark.parametrize("name", ["vit_nano", "vit_b"])
def test_random_weights_give_the_official_masks(
    models: Models, noise: NDArray[np.uint8], name: str, crops: dict[str, Any]
) -> None:
    amg = pytest.importorskip("segment_anything")
    sam, reference = models(name)
    options = {
        "points_per_side": 6,
        "pred_iou_thresh": 0.4,
        "stability_score_thresh": 0.001,
        **_KEEP_ALL,
        **crops,
    }
    theirs = amg.SamAutomaticMaskGenerator(reference, **options).generate(noise)
    ours = MaskGenerator(Predictor(sam), EverythingSettings(**options)).generate(noise)
    proposed = 36 * 3 * (2 if crops else 1)
    assert 4 <= len(theirs) < proposed
    same_masks(ours, theirs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"box_nms_thresh": 0.9},
        {"stability_score_offset": 0.2, "stability_score_thresh": 0.8},
        {**_CROPS, "crop_nms_thresh": 0.9},
        {"crop_n_layers": 2, "crop_n_points_downscale_factor": 2, "crop_overlap_ratio": 0.2},
    ],
    ids=["whole", "suppression", "stability", "crops", "layers"],
)
def test_trained_weights_give_the_official_masks(
    models: Models, scene: NDArray[np.uint8], options: dict[str, Any]
) -> None:
    amg = pytest.importorskip("segment_anything")
    sam, reference = models("embedded")
    options = {
        "points_per_side": 8,
        "pred_iou_thresh": 0.25,
        "stability_score_thresh": 0.1,
        **options,
    }
    theirs = amg.SamAutomaticMaskGenerator(reference, **options).generate(scene)
    assert len(theirs) >= 3
    same_masks(MaskGenerator(Predictor(sam), EverythingSettings(**options)).generate(scene), theirs)


def test_small_regions_go_as_with_the_official_code(
    models: Models, scene: NDArray[np.uint8]
) -> None:
    pytest.importorskip("cv2")
    amg = pytest.importorskip("segment_anything")
    sam, reference = models("embedded")
    options = {"points_per_side": 8, "pred_iou_thresh": 0.3, "stability_score_thresh": 0.2}
    settings = EverythingSettings(**options, min_mask_region_area=200)
    theirs = amg.SamAutomaticMaskGenerator(reference, **options, min_mask_region_area=200)
    ours = MaskGenerator(Predictor(sam), settings).generate(scene)
    same_masks(ours, theirs.generate(scene))


def test_no_mask_has_small_regions(embedded: Sam, scene: NDArray[np.uint8]) -> None:
    from scipy import ndimage

    def smallest(masks: FoundMasks) -> int:
        sizes = []
        for place in range(len(masks)):
            for regions in (masks.mask(place), ~masks.mask(place)):
                numbered, count = ndimage.label(regions, np.ones((3, 3)))
                sizes += np.bincount(numbered.ravel(), minlength=count + 1)[1:].tolist()
        return min(sizes)

    options = {"points_per_side": 8, "pred_iou_thresh": 0.3, "stability_score_thresh": 0.2}
    predictor = Predictor(embedded)
    before = MaskGenerator(predictor, EverythingSettings(**options)).generate(scene)
    cleaned = EverythingSettings(**options, min_mask_region_area=60)
    after = MaskGenerator(predictor, cleaned).generate(scene)
    assert smallest(before) < 60 <= smallest(after)
    assert after.areas().tolist() == [after.mask(place).sum() for place in range(len(after))]


def test_masks_do_not_depend_on_the_memory(
    embedded: Sam, scene: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = EverythingSettings(
        points_per_side=6, pred_iou_thresh=0.4, stability_score_thresh=0.3, **_CROPS
    )
    plenty = MaskGenerator(Predictor(embedded), settings).generate(scene)
    monkeypatch.setattr("ptq4sam.everything.generator._MASK_BYTES", 1)
    little = MaskGenerator(Predictor(embedded, memory_budget=1), settings).generate(scene)
    assert len(plenty) == len(little) >= 3
    for place in range(len(plenty)):
        assert np.count_nonzero(plenty.mask(place) != little.mask(place)) <= 3


def test_a_crop_is_encoded_once(
    embedded: Sam, scene: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    embed = Predictor.embed

    def counting(self: Predictor, image: NDArray[np.uint8]) -> Any:
        seen.append(image.shape[:2])
        return embed(self, image)

    monkeypatch.setattr(Predictor, "embed", counting)
    settings = EverythingSettings(points_per_side=4, crop_n_layers=1, crop_overlap_ratio=0.25)
    MaskGenerator(Predictor(embedded, memory_budget=1), settings).generate(scene)
    assert seen == [(256, 320)] + [(160, 192)] * 4


def test_nothing_is_found_where_nothing_is_good(embedded: Sam, scene: NDArray[np.uint8]) -> None:
    settings = EverythingSettings(
        points_per_side=2, pred_iou_thresh=9, min_mask_region_area=5, **_CROPS
    )
    found = MaskGenerator(Predictor(embedded), settings).generate(scene)
    assert (len(found), found.to_annotations()) == (0, [])


def test_a_bad_picture_is_told(embedded: Sam) -> None:
    with pytest.raises(DataError, match="uint8"):
        MaskGenerator(Predictor(embedded)).generate(np.zeros((9, 9, 4), np.uint8))


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ("points_per_sid=3", "did you mean 'points_per_side'"),
        ("points_per_side=0", "1 or more"),
        ("crop_n_layers=9", "0 to 5"),
        ("box_nms_thresh=1.5", "0 to 1"),
        ("crop_overlap_ratio=1", "0 to below 1"),
        ("stability_score_offset=-1", "0 or more"),
        ("points_per_side=many", "an integer is needed"),
    ],
)
def test_bad_settings_are_told_in_one_line(option: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        EverythingSettings().with_overrides(option)
    assert "\n" not in str(caught.value)


def test_each_layer_has_a_point() -> None:
    with pytest.raises(ConfigError, match="leaves a point to layer 3"):
        EverythingSettings(points_per_side=4, crop_n_layers=3, crop_n_points_downscale_factor=2)
