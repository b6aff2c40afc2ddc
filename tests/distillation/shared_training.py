"""One of several processes that share a small training; see test_training.py."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from ptq4sam import parallel
from ptq4sam.families import VARIANTS
from ptq4sam.families.family import Weights
from ptq4sam.families.tiny_vit.variants import variant
from tests.distillation.conftest import TINY_TINY_VIT
from tests.distillation.killed_training import tiny_training

if __name__ == "__main__":
    torch.set_num_threads(1)
    VARIANTS["tiny_tiny_vit"] = variant("tiny_tiny_vit", Weights("none"), TINY_TINY_VIT)
    folder = Path(sys.argv[1])
    with parallel.joined():
        own = [torch.tensor([float(parallel.rank())]), torch.tensor([[4.0], [2.0]])]
        parallel.average(own)
        assert [tensor.flatten().tolist() for tensor in own] == [[0.5], [4.0, 2.0]]
        training = tiny_training(folder / f"{parallel.rank()}")
        state = training.run(workers=0)
        weights = {name: value.contiguous() for name, value in state.items()}
        save_file(weights, folder / f"{parallel.rank()}.safetensors")
