"""SAMs with random weights, the embedded one, and segment-anything's generator beside ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import nn

from ptq4sam.data.scenes import generate_scene
from ptq4sam.families.checkpoint import load_sam
from ptq4sam.families.sam_vit.sizes import SIZES
from ptq4sam.families.sam_vit.variants import build_variant
from ptq4sam.sam.model import Sam
from tests.reference_sams import build_reference, randomize_state

# SAM-B's widths and depth on a smaller input.
_SIZES = {
    "vit_nano": SIZES["vit_nano"],
    "vit_b": dataclasses.replace(SIZES["vit_b"], image_size=128),
}


@pytest.fixture(scope="session")
def models() -> Callable[[str], tuple[Sam, nn.Module]]:
    """A SAM of ours and segment-anything's with the same weights: by size, or the embedded one."""
    pytest.importorskip("segment_anything")

    def build(name: str) -> tuple[Sam, nn.Module]:
        variant = _SIZES.get(name, SIZES["vit_nano"])
        if name == "embedded":
            sam = load_sam("vit_nano")
        else:
            sam = build_variant(name, variant)
            sam.load_state_dict(randomize_state(sam.state_dict()))
        reference = build_reference(variant)
        reference.load_state_dict(sam.state_dict())
        return sam, reference

    return build


@pytest.fixture(scope="session")
def embedded() -> Sam:
    return load_sam("vit_nano")


@pytest.fixture(scope="session")
def noise() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (150, 203, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def scene() -> NDArray[np.uint8]:
    return generate_scene(4).image
