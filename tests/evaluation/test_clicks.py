"""Clicks: where they go, what they ask, what is counted of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ptq4sam.data import CocoDataset
from ptq4sam.errors import ConfigError
from ptq4sam.evaluation import mask_ious
from ptq4sam.evaluation.clicks import next_click, segment_by_clicks
from ptq4sam.evaluation.evaluate import evaluate_sam
from ptq4sam.evaluation.prompting import Prompting
from ptq4sam.families.checkpoint import load_sam
from ptq4sam.prompts import Clicks, open_prompts
from ptq4sam.runs.summary import summary_table
from ptq4sam.sam.predictor import Predictor

NOTHING = np.zeros((40, 60), np.bool_)


def rectangle(top: int, left: int, bottom: int, right: int) -> NDArray[np.bool_]:
    mask = NOTHING.copy()
    mask[top:bottom, left:right] = True
    return mask


def deepest(region: NDArray[np.bool_]) -> float:
    """Largest distance of a pixel of the region to one outside of it, by trying all."""
    outside = np.argwhere(~np.pad(region, 1))
    inside = np.argwhere(np.pad(region, 1))
    return max(float(np.sqrt(((place - outside) ** 2).sum(1)).min()) for place in inside)


def test_the_first_click_is_in_the_middle_of_the_object() -> None:
    assert next_click(rectangle(10, 20, 21, 31), NOTHING) == ((25.0, 15.0), 1)


def test_a_click_is_as_deep_as_any_pixel_of_the_error() -> None:
    shape = rectangle(5, 5, 35, 12) | rectangle(22, 5, 35, 50)
    (x, y), label = next_click(shape, NOTHING)
    distances = np.sqrt(((np.array([y, x]) - np.argwhere(~shape)) ** 2).sum(1))
    assert label == 1
    assert distances.min() == pytest.approx(deepest(shape))


def test_the_border_of_the_picture_is_a_border() -> None:
    (x, y), _ = next_click(rectangle(0, 0, 9, 40), NOTHING)
    assert y == 4
    assert 4 <= x <= 35


def test_the_larger_error_is_clicked_at_by_its_kind() -> None:
    truth = rectangle(10, 10, 30, 30)
    too_much = truth | rectangle(0, 40, 40, 60)
    assert next_click(truth, too_much) == ((49.0, 9.0), 0)
    too_little = truth & ~rectangle(10, 10, 30, 25)
    (x, y), label = next_click(truth, too_little)
    assert label == 1
    assert truth[int(y), int(x)]
    assert not too_little[int(y), int(x)]


def test_where_nothing_is_wrong_the_object_is_clicked_again() -> None:
    truth = rectangle(10, 20, 21, 31)
    assert next_click(truth, truth) == ((25.0, 15.0), 1)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(load_sam("vit_nano"))


def test_later_clicks_add_to_the_first_and_give_the_mask_so_far(
    predictor: Predictor, scenes: CocoDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = scenes.images[0]
    embedding = predictor.embed(scenes.load(record))
    truth = Clicks(scenes).truth(record)
    asked: list[dict[str, Any]] = []
    predict = predictor.predict

    def note(**arguments: Any) -> Any:
        asked.append(arguments)
        return predict(**arguments)

    monkeypatch.setattr(predictor, "predict", note)
    clicked = segment_by_clicks(predictor, embedding, truth, 3)
    assert [call["multimask"] for call in asked] == [True, False, False]
    assert [call["points"].shape[1] for call in asked] == [1, 2, 3]
    assert asked[0]["masks"] is None
    np.testing.assert_array_equal(asked[2]["points"][:, :2], asked[1]["points"])
    first = [next_click(mask, np.zeros_like(mask))[0] for mask in truth]
    np.testing.assert_array_equal(asked[0]["points"][:, 0], first)
    three = predict(
        points=asked[0]["points"], labels=asked[0]["labels"], multimask=True, embedding=embedding
    )
    best = three.iou_predictions.argmax(dim=1)
    chosen = three.low_res[torch.arange(len(truth)), best][:, None]
    torch.testing.assert_close(asked[1]["masks"], chosen)
    masks = predictor.binary_masks(chosen, embedding)[:, 0].numpy()
    np.testing.assert_allclose(clicked.ious[:, 0], mask_ious(masks, truth))
    second = [next_click(*pair) for pair in zip(truth, masks, strict=True)]
    np.testing.assert_array_equal(asked[1]["points"][:, 1], [place for place, _ in second])
    np.testing.assert_array_equal(asked[1]["labels"][:, 1], [label for _, label in second])
    np.testing.assert_allclose(clicked.ious[:, 2], mask_ious(clicked.segmented.masks, truth))
    assert (clicked.best_of_three >= clicked.ious[:, 0]).all()


def test_scores_of_clicks(predictor: Predictor, scenes: CocoDataset) -> None:
    found = evaluate_sam(
        predictor.sam,
        scenes,
        open_prompts("clicks:3", scenes),
        Prompting(),
        reference=predictor.sam,
    )
    metrics = found.metrics
    assert metrics["mean_iou_clicks_3"] == metrics["mean_iou"]
    assert metrics["mean_iou_clicks_1"] != metrics["mean_iou_clicks_2"]
    assert metrics["mean_iou_best_of_three"] >= metrics["mean_iou_clicks_1"]
    assert 0 < metrics["iou_error"] < 1
    assert metrics["agreement"] == 1
    assert "AP" in metrics
    shown = summary_table({"model": "vit_nano", "float": found.reference_metrics, **metrics})
    assert "after clicks: 1: 0." in shown


def test_predicted_ious_are_compared_with_the_true_ones(
    predictor: Predictor, scenes: CocoDataset
) -> None:
    pairs = []
    found = evaluate_sam(
        predictor.sam,
        scenes,
        open_prompts("ground-truth", scenes),
        Prompting(),
        on_picture=lambda picture: pairs.extend(
            zip(picture.segmented.predicted_ious, picture.ious, strict=True)
        ),
    )
    errors = [abs(float(predicted) - true) for predicted, true in pairs]
    assert found.metrics["iou_error"] == pytest.approx(np.mean(errors))


@pytest.mark.parametrize("text", ["clicks:0", "clicks:", "clicks:many", "clicks:21"])
def test_how_many_clicks_is_a_small_number(text: str, scenes: CocoDataset) -> None:
    with pytest.raises(ConfigError, match="clicks:N for up to N clicks an object, 1 to 20"):
        open_prompts(text, scenes)
