"""A small training that kills its own process behind a step; see test_training.py."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ptq4sam.distillation.settings import DistillationSettings
from ptq4sam.distillation.students import new_student
from ptq4sam.distillation.training import Training
from ptq4sam.families import VARIANTS
from ptq4sam.families.family import Weights
from ptq4sam.families.tiny_vit.variants import variant
from tests.distillation.conftest import SETTINGS, TINY_TINY_VIT, tiny_teacher, tiny_views


def tiny_training(
    folder: Path,
    save_every: float = 1000.0,
    settings: DistillationSettings = SETTINGS,
    **more: str,
) -> Training:
    """With batch normalisations, whose statistics are a part of the state too."""
    teacher = tiny_teacher()
    student = new_student("tiny_tiny_vit", teacher, settings.seed)
    said = {"numbers": "the same", **more}
    return Training(student, teacher, tiny_views(), settings, folder, said, save_every=save_every)


def killed_behind(steps: int) -> Any:
    """Progress that kills this process when so many steps are done."""

    def progress(plan: Sequence[Any], _description: str) -> Iterator[Any]:
        for done, step in enumerate(plan):
            if done == steps:
                os.kill(os.getpid(), signal.SIGKILL)
            yield step

    return progress


if __name__ == "__main__":
    torch.set_num_threads(1)
    VARIANTS["tiny_tiny_vit"] = variant("tiny_tiny_vit", Weights("none"), TINY_TINY_VIT)
    training = tiny_training(Path(sys.argv[1]), save_every=0.0)
    training.run(workers=0, progress=killed_behind(int(sys.argv[2])))
