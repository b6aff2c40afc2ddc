"""MobileSAM's golden vectors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.golden_weights import official_weights

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def official_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of MobileSAM's published state dict."""
    lines = (GOLDEN / "mobile_sam_keys.txt").read_text().splitlines()
    named = [line.split()[:2] for line in lines]
    return {n: () if s == "scalar" else tuple(map(int, s.split("x"))) for n, s in named}


@pytest.fixture(scope="session")
def official_state(official_shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A state dict as MobileSAM publishes one."""
    return official_weights(official_shapes)


@pytest.fixture(scope="session")
def golden_model() -> Mapping[str, Tensor]:
    """What MobileSAM's program makes of `golden_input`, by name."""
    with np.load(GOLDEN / "mobile_sam.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.fixture(scope="session")
def golden_input() -> Tensor:
    values = np.random.RandomState(1234).standard_normal((1, 3, 1024, 1024))
    return torch.from_numpy(values.astype(np.float32))


@pytest.fixture(scope="session")
def golden_blocks() -> Mapping[str, Tensor]:
    """Inputs and outputs of single blocks, as NAME/in and NAME/out."""
    with np.load(GOLDEN / "blocks.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.fixture(scope="session")
def block_states() -> dict[str, dict[str, Tensor]]:
    """The state dict of each block."""
    shapes = json.loads((GOLDEN / "blocks_keys.json").read_text())
    return {
        block: official_weights({name: tuple(shape) for name, shape in named.items()})
        for block, named in shapes.items()
    }
