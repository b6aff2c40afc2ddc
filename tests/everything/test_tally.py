"""Where proposed masks went: each filter's share against the filters done one after the other."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ptq4sam.everything import EverythingSettings, MaskGenerator, Tally
from ptq4sam.sam.model import Sam
from ptq4sam.sam.predictor import Predictor
from tests.tiny_runs import run

_CROPS = {"crop_n_layers": 1, "crop_n_points_downscale_factor": 2}


def tallied(sam: Sam, picture: NDArray[np.uint8], **options: Any) -> tuple[Tally, int]:
    generator = MaskGenerator(Predictor(sam), EverythingSettings(points_per_side=6, **options))
    return generator.tally, len(generator.generate(picture))


@pytest.mark.parametrize("more", [{}, _CROPS, {"min_mask_region_area": 200}])
def test_every_mask_is_kept_or_dropped_once(
    embedded: Sam, scene: NDArray[np.uint8], more: dict[str, Any]
) -> None:
    tally, kept = tallied(embedded, scene, pred_iou_thresh=0.3, stability_score_thresh=0.2, **more)
    assert tally.points == 36 + (4 * 9 if "crop_n_layers" in more else 0)
    assert tally.masks == 3 * tally.points
    assert tally.kept == kept > 0
    assert tally.dropped["pred_iou_thresh"] > 0
    assert tally.dropped["box_nms_thresh"] > 0


def test_each_filter_counts_what_it_alone_would_drop(
    embedded: Sam, scene: NDArray[np.uint8]
) -> None:
    off: dict[str, Any] = {
        "pred_iou_thresh": 0.0,
        "stability_score_thresh": 0.0,
        "box_nms_thresh": 1.0,
    }
    generator = MaskGenerator(Predictor(embedded), EverythingSettings(points_per_side=6, **off))
    every = generator.generate(scene)
    best = float(every.predicted_ious.max())
    assert generator.tally.best_iou == pytest.approx(best)
    assert generator.tally.best_stability == pytest.approx(float(every.stability_scores.max()))
    for name, values, threshold in (
        ("pred_iou_thresh", every.predicted_ious, 0.4),
        ("stability_score_thresh", every.stability_scores, 0.5),
    ):
        tally, kept = tallied(embedded, scene, **{**off, name: threshold})
        assert +tally.dropped == Counter({name: int((values < threshold).sum())})
        assert kept == tally.masks - tally.dropped.total()


def test_the_command_says_what_to_lower_where_nothing_is_left(
    scene: NDArray[np.uint8], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(scene).save(tmp_path / "scene.png")
    asked = ("everything", "--images", tmp_path / "scene.png", "--out", tmp_path / "out")
    run(*asked, "--options", "points_per_side=2", "pred_iou_thresh=0.99")
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("0 masks on 1 pictures")
    assert lines[0] == "4 points, 12 masks proposed; dropped for"
    assert lines[1].strip() == "12 a predicted IoU not above 0.99 (pred_iou_thresh)"
    assert lines[2].startswith("nothing is left: lower pred_iou_thresh; the highest was")
    assert 0 < float(lines[2].rpartition(" ")[2]) < 0.99


def test_tallies_of_several_processes_are_one() -> None:
    one = Tally(4, 12, Counter({"pred_iou_thresh": 12}), 0.4)
    other = Tally(4, 12, Counter({"pred_iou_thresh": 2, "box_nms_thresh": 3}), 0.6, 0.8)
    both = Tally.joined([one, other])
    assert both == Tally(8, 24, Counter({"pred_iou_thresh": 14, "box_nms_thresh": 3}), 0.6, 0.8)
    assert both.kept == 7


def test_thresholds_suit_the_model(embedded: Sam) -> None:
    suited = EverythingSettings.suited_to("vit_nano")
    assert MaskGenerator(Predictor(embedded)).settings == suited != EverythingSettings()
    # SAM's own, and those of a SAM that no family has.
    for name in ("vit_b", "mine"):
        assert EverythingSettings.suited_to(name) == EverythingSettings()
    given = EverythingSettings(points_per_side=3)
    assert MaskGenerator(Predictor(embedded), given).settings == given
