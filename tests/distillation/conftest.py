from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from ptq4sam.distillation.settings import DistillationSettings, Phase, Sampling
from ptq4sam.distillation.students import new_student
from ptq4sam.distillation.trainer import Trainer
from ptq4sam.distillation.views import Batch, Views
from ptq4sam.families import VARIANTS
from ptq4sam.families.family import Weights
from ptq4sam.families.tiny_vit.sizes import NANO
from ptq4sam.families.tiny_vit.variants import variant
from ptq4sam.sam.model import Sam
from tests.model.conftest import TINY, TINY_VARIANT, tiny_sam

TINY_TINY_VIT = replace(
    NANO,
    dims=(8, 16, 16, 16),
    depths=(1, 1, 1, 1),
    num_heads=(1, 1, 1),
    window_sizes=(3, 4, 4),
    image_size=TINY.image_size,
    prompt_dim=TINY.prompt_dim,
    decoder_mlp_dim=TINY.decoder_mlp_dim,
    decoder_heads=TINY.decoder_heads,
    iou_hidden_dim=TINY.iou_hidden_dim,
)
"""A TinyViT with batch normalisations, whose embeddings have the shape of the tiny SAM's."""
SETTINGS = DistillationSettings(
    student="tiny",
    teacher="tiny",
    sampling=Sampling(objects=3, rounds=2),
    phases=(Phase(3, 2, warm_up=2), Phase(2, 2, warm_up=0)),
)


@pytest.fixture(autouse=True)
def tiny_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "tiny", TINY_VARIANT)
    own = variant("tiny_tiny_vit", Weights("none"), TINY_TINY_VIT)
    monkeypatch.setitem(VARIANTS, "tiny_tiny_vit", own)


def tiny_teacher() -> Sam:
    return tiny_sam().requires_grad_(False)


def tiny_views(settings: DistillationSettings = SETTINGS) -> Views:
    """Views of scenes, of 64 pixels with masks of 32 cells."""
    return Views(None, settings.sampling, TINY_VARIANT.geometry, 32, settings.seed)


@pytest.fixture(scope="session")
def batch() -> Batch:
    views = tiny_views()
    return Batch.of([views[(0, index)] for index in range(2)])


def tiny_trainer(
    name: str = "tiny:embed_dim=16", settings: DistillationSettings = SETTINGS
) -> Trainer:
    teacher = tiny_teacher()
    student = new_student(name, teacher, settings.seed)
    return Trainer(student, teacher, settings.phases[0], settings)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Bits depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield
