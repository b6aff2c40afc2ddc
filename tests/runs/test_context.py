"""What a run keeps free of a GPU's memory, computed without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ptq4sam.deploy.cost import meta_sam
from ptq4sam.families import build_sam
from ptq4sam.model import cache
from ptq4sam.model.memory import working_bytes
from ptq4sam.progress import silent
from ptq4sam.runs.context import RunContext
from ptq4sam.runs.settings import DataSettings, RunSettings


@pytest.mark.parametrize("side", [128, 256, 384])
def test_a_gpu_keeps_free_what_a_model_of_the_checkpoints_side_needs(
    side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "tuned.pth"
    torch.save(build_sam("vit_nano", side).state_dict(), checkpoint)
    settings = RunSettings(
        model="vit_nano",
        data=DataSettings(tmp_path),
        prompts="ground-truth",
        work_dir=tmp_path,
        checkpoint=checkpoint,
    )
    needed = working_bytes(meta_sam("vit_nano", image_size=side))
    free = needed + 1000
    monkeypatch.setattr(cache, "free_memory", lambda _device: free)
    assert RunContext(settings, silent, torch.device("cuda", 0)).cache.budget == 1000
    assert RunContext(settings, silent, torch.device("cpu")).cache.budget == free // 2
