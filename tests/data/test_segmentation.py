from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from ptq4sam.data.segmentation import (
    are_numbers,
    decode_segmentation,
    segmentation_problem,
    uncompress,
)


def _masks() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    noise = [rng.random(rng.integers(1, 200, 2)) < rng.choice([0.01, 0.5, 0.99]) for _ in range(40)]
    blocks = [np.kron(rng.random((3, 4)) < 0.5, np.ones(rng.integers(1, 90, 2))) for _ in range(40)]
    return [*noise, *blocks, np.zeros((7, 9)), np.ones((900, 1100)), np.ones((1, 1))]


def test_compressed_runs_are_read_as_pycocotools_writes_them() -> None:
    for mask in _masks():
        height, width = mask.shape
        encoded = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
        counts = encoded["counts"].decode()
        runs = uncompress(counts)
        assert runs is not None
        assert np.array_equal(np.repeat(np.arange(len(runs)) % 2, runs), mask.T.ravel())
        for stored in (counts, runs):
            segmentation = {"size": [height, width], "counts": stored}
            assert segmentation_problem(segmentation, height, width) is None
            decoded = decode_segmentation(segmentation, height, width)
            assert np.array_equal(decoded, mask.astype(bool))
        assert segmentation_problem({"size": [height, width], "counts": counts[:-1]}, height, width)


@pytest.mark.parametrize("counts", ["", "o", "\n\n", "xxxxxxx", "oooooooooooo0", "é"])
def test_text_that_is_no_run_lengths(counts: str) -> None:
    assert segmentation_problem({"size": [5, 5], "counts": counts}, 5, 5) is not None


def test_numbers() -> None:
    assert are_numbers([1, 2.5, -3])
    assert are_numbers([])
    for bad in (float("nan"), float("inf"), -float("inf"), True, None, "1", 10**400):
        assert not are_numbers([1.0, bad])
