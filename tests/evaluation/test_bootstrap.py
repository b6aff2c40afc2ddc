"""Intervals of differences against a loop over single draws, and against what is known of them."""

from __future__ import annotations

import numpy as np
import pytest

from ptq4sam.evaluation.bootstrap import Difference, paired_difference


def models(
    pictures: int, shift: float, noise: float, seed: int = 0
) -> tuple[list[float], list[float], list[int]]:
    """Mean IoUs of two models: pictures differ much more than models."""
    random = np.random.default_rng(seed)
    second = random.uniform(0.2, 0.9, pictures)
    first = second + shift + noise * random.standard_normal(pictures)
    return first.tolist(), second.tolist(), random.integers(0, 12, pictures).tolist()


def test_an_interval_is_that_of_single_draws() -> None:
    first, second, counts = models(60, -0.02, 0.05)
    found = paired_difference(first, second, counts)
    objects = [
        (p, f, s)
        for p, (f, s, n) in enumerate(zip(first, second, counts, strict=True))
        for _ in range(n)
    ]
    assert found.value == pytest.approx(
        np.mean([f for _, f, _ in objects]) - np.mean([s for *_, s in objects])
    )
    assert found.pictures == sum(n > 0 for n in counts)
    by_picture = {p: [(f, s) for q, f, s in objects if q == p] for p, *_ in objects}
    random, names = np.random.default_rng(7), sorted(by_picture)
    differences = []
    for _ in range(3000):
        drawn = [pair for name in random.choice(names, len(names)) for pair in by_picture[name]]
        differences.append(np.mean([f for f, _ in drawn]) - np.mean([s for _, s in drawn]))
    expected = np.percentile(differences, [2.5, 97.5])
    assert [found.low, found.high] == pytest.approx(expected.tolist(), abs=0.0015)


def test_pairs_tell_what_means_alone_would_not() -> None:
    """Models 1 point apart on pictures that are 20 apart."""
    first, second, counts = models(200, 0.01, 0.02)
    found = paired_difference(first, second, counts)
    assert found.is_one
    assert found.high - found.low < 0.02
    mixed = paired_difference(first, np.random.default_rng(1).permutation(second).tolist(), counts)
    assert not mixed.is_one
    assert mixed.high - mixed.low > 0.05


def test_intervals_of_equal_models_hold_zero_as_often_as_said() -> None:
    held = [
        not paired_difference(*models(80, 0.0, 0.05, seed), draws=500, seed=seed).is_one
        for seed in range(200)
    ]
    assert 0.88 <= np.mean(held) <= 0.99


def test_words_and_repetition() -> None:
    first, second, counts = models(30, 0.0, 0.05)
    assert paired_difference(first, second, counts) == paired_difference(first, second, counts)
    said = Difference(-0.012, -0.0204, -0.0049, 100)
    assert str(said) == "-1.2 (95%: -2.0 to -0.5): a difference"
    assert str(Difference(0.001, -0.01, 0.02, 9)).endswith(
        "no difference beyond the choice of pictures"
    )
    # Whatever pictures are drawn, with however many objects.
    shifted = paired_difference([x + 0.25 for x in first], first, counts)
    assert [shifted.low, shifted.high] == pytest.approx([0.25, 0.25])
    same = paired_difference(first, first, counts)
    assert (same.value, same.low, same.high, same.is_one) == (0, 0, 0, False)


def test_what_has_no_pairs_is_refused() -> None:
    with pytest.raises(ValueError, match="means of 2 and 1 pictures"):
        paired_difference([0.1, 0.2], [0.1], [1, 1])
    with pytest.raises(ValueError, match="0 of them above 0"):
        paired_difference([0.1], [0.1], [0])
