"""The description fits the network: nothing is missed, nothing is named that there is not."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ptq4sam.deploy.cost import count
from ptq4sam.families.efficientvit.sizes import XL0, EfficientViTSize
from ptq4sam.families.efficientvit.variants import PUBLISHED, SIZES, build_variant
from ptq4sam.operators.base import INPUT, PORTABLE, QUANTIZED, WORK
from ptq4sam.operators.linear_attention import ReluLinearAttention
from ptq4sam.sam.model import Sam
from ptq4sam.skeletons import shapes_alone
from tests.families.efficientvit.conftest import TINY, tiny_sam

MULTIPLIES = (nn.Conv2d, nn.Linear, ReluLinearAttention)


def modules(sam: Sam) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in sam.named_modules()
        if name.startswith("image_encoder.") and not list(module.children())
    }


def on_meta(size: EfficientViTSize) -> Sam:
    with shapes_alone():
        return build_variant("any", size)


@pytest.mark.parametrize("name", list(SIZES))
def test_every_operator_is_listed_once(name: str) -> None:
    sam = on_meta(SIZES[name])
    described = sam.description
    for path, module in modules(sam).items():
        multiplies = isinstance(module, MULTIPLIES)
        quantized = described.place_of(path) is not None
        assert multiplies == (quantized or described.may_multiply(path)), path
        assert not (quantized and described.may_multiply(path)), path
        assert not quantized or type(module) in QUANTIZED, path
        assert multiplies == (type(module) in WORK), path
        # What is neither quantized nor portable would be rounded by each runtime in its own way.
        assert quantized != described.is_portable(path), path
        assert not described.is_portable(path) or type(module) in PORTABLE, path
        if list(module.parameters(recurse=False)) and not multiplies:
            assert described.may_hold(path), path
    for tensor in sam.state_dict():
        assert described.part_of(tensor) != "other", tensor
        assert described.size_of(tensor) != "other", tensor


@pytest.mark.parametrize("size", [TINY, XL0])
def test_no_pattern_is_dead(size: EfficientViTSize) -> None:
    sam = on_meta(size)
    described = sam.description
    names = [name for name, _ in sam.named_modules()]
    whole = [place.pattern for place in described.quantized]
    # XL0 has no residual blocks.
    absent = r"main\.conv\d" if size is XL0 else "nothing"
    for pattern in (*whole, *described.stays_float, *described.portable):
        there = any(re.fullmatch(pattern, name) for name in names)
        assert there or re.search(absent, pattern.replace("\\", "")), pattern
    tensors = [*sam.state_dict(), *(f"{name}.weight.codes" for name in names)]
    paths = [*names, *tensors, *(f"{name}." for name in names)]
    for pattern, part in (*described.parts, *described.sizes):
        there = any(re.match(pattern, path) for path in paths)
        assert there or (size is XL0 and part == "encoder residual blocks"), part
    assert all(name in tensors for name in described.origin)


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 0])
def test_roles_are_what_flows(depth: int) -> None:
    """Inputs behind a GELU hold what a GELU gave, and no others do."""
    sam = tiny_sam(replace(TINY, depths=(depth, 1, 1, 1, 1)))
    given: list[Tensor] = []
    found: dict[str, bool] = {}

    def watch(name: str) -> None:
        def look(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[name] = any(inputs[0].equal(other) for other in given)

        sam.get_submodule(name).register_forward_pre_hook(look)

    for name, module in modules(sam).items():
        if isinstance(module, nn.GELU):
            module.register_forward_hook(lambda _m, _i, output: given.append(output))
        elif isinstance(module, nn.Conv2d) and sam.description.place_of(name):
            watch(name)
    sam.image_encoder(torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    roles = {name: sam.description.roles(name, INPUT) for name in found}
    assert {n for n, r in roles.items() if "after-gelu" in r} == {n for n, f in found.items() if f}
    assert sum(found.values()) > 8


@torch.no_grad()
def test_geometry_is_what_the_encoder_gives() -> None:
    sam = tiny_sam()
    assert tuple(sam.image_encoder(torch.zeros(1, 3, 64, 64)).shape[1:]) == (32, 8, 8)
    for size in PUBLISHED.values():
        assert size.geometry.features == ((256, 64, 64),)
        assert size.geometry.prompt_side == 1024


MACS = {
    "l0": 34_705_768_448,
    "l1": 48_876_486_656,
    "l2": 68_415_913_984,
    "xl0": 184_493_015_040,
    "xl1": 321_247_510_528,
}
"""Of the encoder's convolutions, as the published program makes them."""


@pytest.mark.parametrize("name", list(MACS))
def test_work_is_that_of_the_published_convolutions(name: str) -> None:
    cost = count(f"efficientvit_sam_{name}")
    own = [part for part in cost.parts if part.name.startswith(("encoder", "stem"))]
    macs = sum(part.macs for part in own if part.name != "encoder attention")
    assert macs == MACS[name]
    attention = next(part for part in own if part.name == "encoder attention")
    assert 0 < attention.macs < macs / 100
    # A convolution's weights, biases of folded norms, and the last norm.
    size = SIZES[f"efficientvit_sam_{name}"]
    assert sum(part.parameters for part in own) == sum(
        p.numel() for p in on_meta(size).image_encoder.parameters()
    )
