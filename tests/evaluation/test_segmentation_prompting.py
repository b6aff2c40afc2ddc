from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ptq4sam.errors import ConfigError
from ptq4sam.evaluation.prompting import Prompting
from ptq4sam.evaluation.segmentation import segment
from ptq4sam.families import build_sam
from ptq4sam.sam.predictor import ImageEmbedding, Predictor

BOXES = np.array([[10, 10, 90, 70], [40, 5, 120, 90], [0, 0, 128, 96]], np.float32)
SCORES = np.array([0.9, 0.5, 0.25], np.float32)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Predictor(build_sam("vit_nano"))


@pytest.fixture(scope="module")
def embedding(predictor: Predictor) -> ImageEmbedding:
    image = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    return predictor.embed(image)


def test_one_mask_a_box_in_the_size_of_the_picture(
    predictor: Predictor, embedding: ImageEmbedding
) -> None:
    segmented = segment(predictor, embedding, BOXES, SCORES, Prompting())
    assert segmented.masks.shape == (3, 96, 128)
    assert segmented.masks.dtype == np.bool_
    np.testing.assert_allclose(segmented.scores, SCORES * segmented.predicted_ious, rtol=1e-6)
    single = predictor.predict(boxes=BOXES, embedding=embedding)
    np.testing.assert_array_equal(
        segmented.predicted_ious, single.iou_predictions[:, 0].detach().numpy()
    )


def test_best_of_three_masks_and_first_of_three(
    predictor: Predictor, embedding: ImageEmbedding
) -> None:
    three = predictor.predict(boxes=BOXES, multimask=True, embedding=embedding)
    ious = three.iou_predictions.detach()
    assert ious.shape == (3, 3)
    best = segment(predictor, embedding, BOXES, SCORES, Prompting(best_in_multi_mask=True))
    np.testing.assert_array_equal(best.predicted_ious, ious.amax(dim=1).numpy())
    chosen = three.low_res[torch.arange(3), ious.argmax(dim=1)][:, None]
    expected = predictor.binary_masks(chosen, embedding)[:, 0].numpy()
    np.testing.assert_array_equal(best.masks, expected)
    first = segment(predictor, embedding, BOXES, SCORES, Prompting(multimask=True))
    np.testing.assert_array_equal(first.predicted_ious, ious[:, 0].numpy())


def test_cascade_prompts_again_with_the_first_logits(
    predictor: Predictor, embedding: ImageEmbedding
) -> None:
    once = predictor.predict(boxes=BOXES, embedding=embedding)
    twice = predictor.predict(boxes=BOXES, masks=once.low_res, embedding=embedding)
    cascade = segment(predictor, embedding, BOXES, SCORES, Prompting(cascade=True))
    np.testing.assert_array_equal(cascade.predicted_ious, twice.iou_predictions[:, 0].numpy())
    plain = segment(predictor, embedding, BOXES, SCORES, Prompting())
    assert not np.array_equal(cascade.predicted_ious, plain.predicted_ious)


def test_score_by_the_mean_probability_inside(
    predictor: Predictor, embedding: ImageEmbedding
) -> None:
    segmented = segment(predictor, embedding, BOXES, SCORES, Prompting(use_sam_iou=False))
    logits = predictor.predict(boxes=BOXES, embedding=embedding).low_res[:, 0].detach()
    for score, box_score, mask in zip(segmented.scores, SCORES, logits, strict=True):
        inside = mask[mask > 0].sigmoid()
        expected = float(inside.mean()) * box_score if len(inside) else 0.0
        assert score == pytest.approx(expected, rel=1e-5)


def test_scores_of_boxes_may_be_kept(predictor: Predictor, embedding: ImageEmbedding) -> None:
    kept = segment(predictor, embedding, BOXES, SCORES, Prompting(keep_scores=True))
    np.testing.assert_array_equal(kept.scores, SCORES)
    plain = segment(predictor, embedding, BOXES, SCORES, Prompting())
    np.testing.assert_array_equal(kept.masks, plain.masks)
    np.testing.assert_array_equal(kept.predicted_ious, plain.predicted_ious)


def test_boxes_of_one_picture_do_not_influence_each_other(
    predictor: Predictor, embedding: ImageEmbedding
) -> None:
    together = segment(predictor, embedding, BOXES, SCORES, Prompting())
    for row in range(3):
        part = slice(row, row + 1)
        alone = segment(predictor, embedding, BOXES[part], SCORES[part], Prompting())
        np.testing.assert_allclose(alone.scores, together.scores[part], rtol=1e-4)
        assert np.mean(alone.masks[0] != together.masks[row]) < 1e-3


def test_no_box_gives_no_mask(predictor: Predictor, embedding: ImageEmbedding) -> None:
    segmented = segment(predictor, embedding, BOXES[:0], SCORES[:0], Prompting())
    assert segmented.masks.shape == (0, 96, 128)
    assert segmented.scores.shape == segmented.predicted_ious.shape == (0,)


@pytest.mark.parametrize(
    "impossible", [{"max_per_image": 0}, {"score_threshold": -0.1}, {"score_threshold": 1.1}]
)
def test_prompting_without_any_box_is_refused(impossible: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        replace(Prompting(), **impossible)
