"""EfficientViT-SAM's golden vectors, and a small SAM of the family."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ptq4sam.families.efficientvit.sizes import EfficientViTSize
from ptq4sam.families.efficientvit.variants import build_variant, variant
from ptq4sam.families.family import Weights
from ptq4sam.model.calibration import CalibrationItem
from ptq4sam.sam.model import Sam
from tests.golden_weights import official_weights

GOLDEN = Path(__file__).parent / "golden"

TINY = EfficientViTSize(
    widths=(8, 8, 16, 16, 32),
    depths=(1, 1, 1, 1, 1),
    expansions=(1, 2, 2, 2, 2),
    head_dim=16,
    neck_depth=1,
    image_size=64,
    prompt_dim=32,
    decoder_mlp_dim=64,
    decoder_heads=2,
    iou_hidden_dim=32,
)
"""Every kind of block once, and two squares: pictures in 64 pixels, prompts in 128."""
TINY_VARIANT = variant("tiny_efficientvit", TINY, Weights("tiny_efficientvit.safetensors"))


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def tiny_sam(size: EfficientViTSize = TINY) -> Sam:
    """With random weights of the size that trained ones have."""
    torch.manual_seed(0)
    sam = build_variant("tiny_efficientvit", size)
    for parameter in sam.image_encoder.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=(1.5 / parameter[0].numel()) ** 0.5)
    return sam


@pytest.fixture(scope="session")
def tiny() -> Sam:
    with torch.random.fork_rng():
        return tiny_sam()


@pytest.fixture(scope="session")
def items() -> list[CalibrationItem]:
    generator = torch.Generator().manual_seed(1)
    boxes = torch.tensor([[8.0, 8, 80, 80], [20, 40, 120, 100]])
    side = TINY.image_size
    return [
        CalibrationItem(torch.randn(1, 3, side, side, generator=generator), boxes) for _ in range(2)
    ]


def golden(name: str) -> dict[str, Tensor]:
    """What the published program gives, by name."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}


@pytest.fixture(scope="session")
def golden_blocks() -> Mapping[str, Tensor]:
    """Inputs and outputs of single blocks, as NAME/in and NAME/out."""
    return golden("blocks")


@pytest.fixture(scope="session")
def block_states() -> dict[str, dict[str, Tensor]]:
    """The state dict of each block."""
    shapes = json.loads((GOLDEN / "blocks_keys.json").read_text())
    return {
        block: official_weights({name: tuple(shape) for name, shape in named.items()})
        for block, named in shapes.items()
    }


def official_state(sam: Sam) -> dict[str, Tensor]:
    """A published state dict of an unfolded SAM, by the rule."""
    return official_weights({name: tuple(t.shape) for name, t in sam.state_dict().items()})
