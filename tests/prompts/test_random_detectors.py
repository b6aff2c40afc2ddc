"""Random detectors of the tests have no parameter that is left as memory was found.

Such a parameter, as `level_embed` in mmdetection's DINO, makes a test fail once in many runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from tests import tiny_detectors
from tests.mmdet_models import CONFIGS, random_detector, require_mmdet
from tests.prompts.detr.test_detector import BUILD


@pytest.fixture(autouse=True)
def _memory_is_no_number() -> Iterator[None]:
    """What is allocated without a value is NaN."""
    fills = torch.utils.deterministic.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fills
    torch.use_deterministic_algorithms(before)


def left_over(model: nn.Module) -> list[str]:
    return [name for name, value in model.state_dict().items() if not value.isfinite().all()]


def test_memory_without_a_value_is_seen() -> None:
    model = nn.Module()
    model.forgotten = nn.Parameter(torch.empty(3))
    assert left_over(model) == ["forgotten"]


@pytest.mark.parametrize("kind", tiny_detectors.KINDS)
def test_those_of_transformers(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    assert left_over(tiny_detectors.save(kind, tmp_path, ["a", "b"])) == []


@pytest.mark.parametrize("build", BUILD.values(), ids=BUILD.keys())
def test_our_own(build: Callable[[], nn.Module]) -> None:
    assert left_over(build()) == []


@pytest.mark.parametrize(
    "config",
    ["yolox/yolox_nano_8x8_300e_coco.py", "dino/dino_4scale_r50_8x2_12e_coco.py"],
)
def test_those_of_mmdetection(config: str) -> None:
    require_mmdet()
    assert left_over(random_detector(CONFIGS / config)) == []
