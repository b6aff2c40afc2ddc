"""A small fine-tuning whose reconstruction kills its own process; see test_killed_tuning.py."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ptq4sam.data.scenes import write_scenes
from ptq4sam.distillation.settings import DistillationSettings, Phase, Sampling, Source
from ptq4sam.families import VARIANTS
from ptq4sam.model.journal import Journal
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.runs.distilling import DistillationRequest, distil
from tests.model.conftest import TINY_VARIANT, scheme_of, tiny_sam


def written_inputs(folder: Path) -> Path:
    """A folder with weights and pictures."""
    save_file({k: v.contiguous() for k, v in tiny_sam().state_dict().items()}, weights_in(folder))
    write_scenes(folder, 2, seed=0, split="train")
    return folder


def weights_in(folder: Path) -> Path:
    return folder / "tiny.safetensors"


def reconstructed(**more: object) -> Scheme:
    """A scheme that is reconstructed first, in little time."""
    return scheme_of(4, steps=2, calibrate=2, **more).with_overrides(
        "w_qconfig.observer=MinMaxObserver"
    )


def tuned(inputs: Path, folder: Path, scheme: Scheme, *, resume: bool = True) -> bytes:
    """What a fine-tuning of two steps leaves; goes on with what is in `folder`."""
    source = Source(inputs / "images/train", inputs / "annotations/train.json")
    settings = DistillationSettings(
        student="tiny",
        data=(source,),
        sampling=Sampling(objects=2, rounds=0),
        phases=(Phase(2, 1, warm_up=0),),
    )
    request = DistillationRequest(
        settings,
        folder / "tuned.safetensors",
        folder / "work",
        init=weights_in(inputs),
        device="cpu",
        workers=0,
        resume=resume,
        scheme=scheme,
    )
    return distil(request).read_bytes()


def _kill_behind(units: int) -> None:
    """Kill this process when so many units are in the journal."""
    record, seen = Journal.record, []

    def recorded(self: Journal, name: str, *arguments: Any) -> None:
        record(self, name, *arguments)
        seen.append(name)
        if len(seen) == units:
            os.kill(os.getpid(), signal.SIGKILL)

    Journal.record = recorded  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    VARIANTS["tiny"] = TINY_VARIANT
    _kill_behind(int(sys.argv[3]))
    tuned(Path(sys.argv[1]), Path(sys.argv[2]), reconstructed())
