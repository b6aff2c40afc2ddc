"""The tiny SAM of tests/model behind the command line, as `--model tiny`.

A module that needs it says `pytest_plugins = ("tests.tiny_sam_fixtures",)`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ptq4sam.data.scenes import write_scenes
from ptq4sam.families import VARIANTS, build_sam
from ptq4sam.quantization.scheme import Scheme
from tests.model.conftest import TINY_VARIANT
from tests.tiny_runs import SCHEMES
from tests.tiny_sams import TinySam


@pytest.fixture(scope="module")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> TinySam:
    folder = tmp_path_factory.mktemp("tiny_sam")
    write_scenes(folder, 2, seed=0, split="train")
    write_scenes(folder, 3, seed=1, split="val")
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setitem(VARIANTS, "tiny", TINY_VARIANT)
        torch.manual_seed(0)
        model = build_sam("tiny")
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "tiny.safetensors")
    scheme = Scheme.from_yaml(SCHEMES / "ptq4sam-s44.yaml")
    quick = scheme.with_overrides("w_qconfig.observer=MinMaxObserver", "calibrate=2")
    (folder / "scheme.yaml").write_text(quick.to_yaml())
    return TinySam(folder)


@pytest.fixture
def tiny_sam(tiny_files: TinySam, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> TinySam:
    """The files, with the tiny SAM known by name, in an empty current folder."""
    monkeypatch.setitem(VARIANTS, "tiny", TINY_VARIANT)
    monkeypatch.chdir(tmp_path)
    return tiny_files
