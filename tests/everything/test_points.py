"""Sparse grids and what is asked after them, against slow code that says the published rule."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptq4sam.errors import ConfigError
from ptq4sam.everything import EverythingSettings, FoundMasks, Hierarchical, MaskGenerator
from ptq4sam.everything.crops import Crop, grid_of
from ptq4sam.everything.filters import without_duplicates
from ptq4sam.everything.points import (
    Points,
    farthest_first,
    points_of,
    published_points,
    sparse_and_rest,
)
from ptq4sam.sam.model import Sam
from ptq4sam.sam.predictor import Predictor

SIZES = [(480, 640), (427, 640), (375, 500), (33, 47), (30, 40)]
LOOSE = {"points_per_side": 8, "pred_iou_thresh": 0.2, "stability_score_thresh": 0.05}


def rows(points: Points) -> set[tuple[float, float]]:
    return {(round(float(x), 9), round(float(y), 9)) for x, y in points}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("per_side", "coarser"), [(32, 4), (32, 3), (7, 4), (5, 2), (1, 4)])
def test_both_parts_are_the_plain_grid(size: tuple[int, int], per_side: int, coarser: int) -> None:
    sparse, rest = sparse_and_rest(size, per_side, coarser)
    plain = grid_of(Crop((0, 0, size[1], size[0]), 0), EverythingSettings(points_per_side=per_side))
    assert len(sparse) + len(rest) == len(plain)
    assert rows(sparse) | rows(rest) == rows(plain)
    assert len(sparse) == math.ceil(per_side / coarser) ** 2


@pytest.mark.parametrize("count", [0, 1, 20, 59, 60, 99])
def test_each_point_is_the_farthest_from_all_before(count: int) -> None:
    chosen, others = sparse_and_rest((48, 64), 8, 4)
    taken = [tuple(point) for point in chosen]
    left = [tuple(point) for point in others]
    for _ in range(min(count, len(left))):
        distances = [min(math.dist(point, one) for one in taken) for point in left]
        taken.append(left.pop(distances.index(max(distances))))
    found = farthest_first(chosen, others, count)
    assert [tuple(point) for point in found] == [
        tuple(point) for point in others if tuple(point) in taken
    ]


def neighbours_by_hand(width: int, height: int) -> list[tuple[float, float]]:
    """Round two of the release for 8 x 8 seeds and 32 steps, seed by seed."""
    dx, dy = width // 32, height // 32
    found = []
    for row in range(8):
        for column in range(8):
            x, y = (column + 0.5) / 8 * width, (row + 0.5) / 8 * height
            away = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if (a, b) != (0, 0)]
            if x + 2 * dx < width:
                away += [(2, -1), (2, 0), (2, 1)]
            if y + 2 * dy < height:
                away += [(-1, 2), (0, 2), (1, 2)]
            if x + 2 * dx < width and y + 2 * dy < height:
                away += [(2, 2)]
            found += [(x + a * dx, y + b * dy) for a, b in away]
    return found


@pytest.mark.parametrize(
    ("size", "count"), [((480, 640), 961), ((427, 640), 31 * 32), ((375, 500), 1024)]
)
def test_published_points_are_those_of_the_release(size: tuple[int, int], count: int) -> None:
    sparse, rest = published_points(size, 32, 4)
    expected = neighbours_by_hand(size[1], size[0])
    assert len(rest) == len(expected)
    assert rows(rest) == {(round(x, 9), round(y, 9)) for x, y in expected}
    assert len(sparse) + len(rest) == count


@pytest.mark.parametrize("size", [(30, 40), (16, 16), (3, 2), (1, 1)])
def test_tiny_pictures_have_each_published_point_once(size: tuple[int, int]) -> None:
    sparse, rest = published_points(size, 32, 4)
    every = np.concatenate([sparse, rest])
    assert len(rows(every)) == len(every)
    assert (every >= 0).all()
    assert (every < np.array(size[::-1])).all()


def asked_after(
    rule: Hierarchical, draw: Callable[[Tensor], None], **settings: float
) -> list[Points]:
    """The rounds of a picture of 64 x 64 for which each round finds the mask that `draw` draws."""
    options = EverythingSettings(points_per_side=8, hierarchical=rule, **settings)  # type: ignore[arg-type]
    source = points_of(Crop((0, 0, 64, 64), 0), options)
    rounds = []
    while len(points := source.ask(FoundMasks.none())):
        rounds.append(points)
        logits = torch.full((1, 64, 64), -3.0)
        draw(logits)
        source.see(logits)
    return rounds


def test_a_point_is_asked_where_no_mask_is_confident() -> None:
    def draw(logits: Tensor) -> None:
        logits[:, :, :32] = 8.6
        logits[:, :, 32:] = 8.5  # as high as the threshold, not higher

    first, second = asked_after(Hierarchical(), draw)
    assert len(first) == 4
    assert (second[:, 0] > 32).all()
    assert len(second) == 32 - 2


@pytest.mark.parametrize(("share", "count"), [(0.5, 32), (0.3, 19), (0.01, 4)])
def test_a_share_of_the_points_is_asked_and_confidence_still_counts(
    share: float, count: int
) -> None:
    everywhere = asked_after(Hierarchical(share=share), lambda logits: logits.fill_(-9.0))
    assert sum(len(points) for points in everywhere) == count
    covered = asked_after(Hierarchical(share=share), lambda logits: logits.fill_(9.0))
    assert [len(points) for points in covered] == [4]


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_is_above_zero_and_at_most_all(share: float) -> None:
    with pytest.raises(ConfigError, match=r"share: .* above 0, to 1"):
        Hierarchical(share=share)


def test_several_masks_are_confident_together() -> None:
    rule = Hierarchical()
    source = points_of(
        Crop((0, 0, 64, 64), 0), EverythingSettings(points_per_side=8, hierarchical=rule)
    )
    source.ask(FoundMasks.none())
    for rows_of in (slice(0, 32), slice(32, 48)):
        logits = torch.full((1, 64, 64), -9.0)
        logits[:, rows_of] = 9.0
        source.see(logits)
    assert (source.ask(FoundMasks.none())[:, 1] > 48).all()


def test_nothing_more_is_asked_where_all_is_confident() -> None:
    assert len(asked_after(Hierarchical(), lambda logits: logits.fill_(9.0))) == 1


def test_relative_confidence_is_a_share_of_the_highest_logit() -> None:
    def draw(logits: Tensor) -> None:
        logits[:, :, :32] = 0.9
        logits[:, :, 32:] = 1.0
        logits[:, 63, 63] = 1.25  # where no point is

    rule = Hierarchical(relative=True, high_score_thresh=0.75)
    _, second = asked_after(rule, draw)
    assert (second[:, 0] < 32).all()
    empty = asked_after(rule, lambda logits: logits.fill_(-2.0))
    assert len(empty[1]) == 60


def test_batches_take_the_least_covered_points_first() -> None:
    def draw(logits: Tensor) -> None:
        logits[:] = torch.arange(64.0).neg()[None, :, None] / 10

    first, *batches = asked_after(Hierarchical(batch=16), draw)
    # In this picture confidence falls from top to bottom.
    for earlier, later in itertools.pairwise(batches):
        assert earlier[:, 1].min() >= later[:, 1].max()
    assert [len(batch) for batch in batches] == [16, 16, 16, 12]
    assert len(rows(np.concatenate([first, *batches]))) == 64


def test_a_batch_covers_what_the_next_would_ask() -> None:
    seen = []

    def draw(logits: Tensor) -> None:
        seen.append(1)
        if len(seen) == 2:
            logits[:, :32] = 9.0

    _, _, *later = asked_after(Hierarchical(batch=4), draw)
    assert (np.concatenate(later)[:, 1] > 32).all()


def test_fruitless_batches_end_it() -> None:
    """A new mask in the second batch, none in the third and fourth."""
    rule = Hierarchical(batch=4, patience=2)
    settings = EverythingSettings(points_per_side=8, hierarchical=rule)
    source = points_of(Crop((0, 0, 64, 64), 0), settings)

    def found(count: int) -> FoundMasks:
        boxes = np.array([[9 * place, 0, 9 * place + 5, 9] for place in range(count)] * 2, np.int64)
        columns = np.zeros(2 * count, np.float32)
        return FoundMasks(
            [{}] * (2 * count),
            boxes.reshape(-1, 4),
            columns,
            columns,
            np.zeros((2 * count, 2)),
            boxes,
        )

    asked = [len(source.ask(found(count))) for count in (0, 0, 0, 1, 1, 1)]
    assert asked == [4, 4, 4, 4, 4, 0]


@pytest.mark.parametrize("rule", [Hierarchical(), Hierarchical(batch=7)])
def test_without_confidence_the_masks_are_the_plain_ones(
    embedded: Sam, scene: NDArray[np.uint8], rule: Hierarchical
) -> None:
    plain = MaskGenerator(Predictor(embedded), EverythingSettings(**LOOSE))  # type: ignore[arg-type]
    expected = plain.generate(scene)
    unsure = Hierarchical(high_score_thresh=1e9, batch=rule.batch)
    settings = EverythingSettings(**LOOSE, hierarchical=unsure)  # type: ignore[arg-type]
    found = MaskGenerator(Predictor(embedded), settings).generate(scene)
    assert rows(found.points) == rows(expected.points)
    order, other = np.lexsort(found.points.T), np.lexsort(expected.points.T)
    assert np.abs(found.predicted_ious[order] - expected.predicted_ious[other]).max() < 1e-4


def highest_logits(predictor: Predictor, image: NDArray[np.uint8], points: Points) -> Points:
    """Of all masks of points that pass the filters of `LOOSE`, at each pixel; one by one."""
    embedding = predictor.embed(image)
    highest = np.full(image.shape[:2], -np.inf)
    for x, y in points:
        predicted = predictor.predict([[(x, y)]], [[1]], multimask=True, embedding=embedding)
        logits = predictor.full_resolution(predicted.low_res, embedding)[0]
        for mask, iou in zip(logits, predicted.iou_predictions[0], strict=True):
            stable = (mask > 1).sum() / (mask > -1).sum().clamp(min=1)
            if iou > LOOSE["pred_iou_thresh"] and stable >= LOOSE["stability_score_thresh"]:
                highest = np.maximum(highest, mask.numpy())
    return highest


def test_the_second_round_is_what_slow_code_says(embedded: Sam, scene: NDArray[np.uint8]) -> None:
    """Union of confident areas over all masks that pass the filters, then one suppression."""
    predictor = Predictor(embedded)
    size = scene.shape[0], scene.shape[1]
    sparse, rest = published_points(size, 8, 4)
    highest = highest_logits(predictor, scene, sparse)[
        rest[:, 1].astype(int), rest[:, 0].astype(int)
    ]
    # Between two logits that were found, so that half of the points are asked.
    middle = np.sort(highest)[len(rest) // 2 - 1 :][:2].mean()
    rule = Hierarchical(high_score_thresh=float(middle), grid="published")
    generator = MaskGenerator(predictor, EverythingSettings(**LOOSE, hierarchical=rule))  # type: ignore[arg-type]
    found = generator.generate(scene)

    unclear = rest[highest <= middle]
    assert len(unclear) == len(rest) // 2
    plain = MaskGenerator(predictor, EverythingSettings(**LOOSE))  # type: ignore[arg-type]
    crop, embedding = Crop((0, 0, size[1], size[0]), 0), predictor.embed(scene)
    rounds = [plain.at_points(embedding, points, crop, size) for points in (unclear, sparse)]
    every = FoundMasks.joined(rounds)
    expected = every.take(without_duplicates(every.boxes, every.predicted_ious, 0.7))
    assert generator.tally.points == len(sparse) + len(unclear)
    assert np.allclose(found.points, expected.points)
    assert np.array_equal(found.boxes, expected.boxes)


def test_crops_have_hierarchies_of_their_own(embedded: Sam, scene: NDArray[np.uint8]) -> None:
    settings = EverythingSettings(
        points_per_side=4,
        pred_iou_thresh=9,
        crop_n_layers=1,
        hierarchical=Hierarchical(coarser=2),
    )
    generator = MaskGenerator(Predictor(embedded), settings)
    generator.generate(scene)
    assert generator.tally.points == 5 * 16


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ("hierarchical.coarse=4", "did you mean 'coarser'"),
        ("hierarchical.coarser=1", "2 or more"),
        ("hierarchical.relative=true", "share of the highest logit"),
        ("hierarchical.patience=2", "0 where points are asked at once"),
        ("hierarchical.batch=-1", "0 or more"),
        ("hierarchical.grid=dense", "plain, published"),
    ],
)
def test_bad_settings_are_told_in_one_line(option: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        EverythingSettings(hierarchical=Hierarchical()).with_overrides(option)
    assert "\n" not in str(caught.value)
