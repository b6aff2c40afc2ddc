"""The description fits the network: nothing is missed, nothing is named that there is not."""

from __future__ import annotations

import re
from collections import defaultdict

import pytest
import torch
from torch import Tensor, nn

from ptq4sam.families import build_sam
from ptq4sam.families.tiny_vit.description import ENCODER
from ptq4sam.families.tiny_vit.sizes import NANO, PUBLISHED
from ptq4sam.families.tiny_vit.variants import build_variant
from ptq4sam.operators.attention import SoftmaxAttention
from ptq4sam.operators.base import INPUT, PORTABLE, QUANTIZED, WORK
from ptq4sam.sam.model import Sam
from ptq4sam.skeletons import shapes_alone

MULTIPLIES = (nn.Conv2d, nn.Linear, SoftmaxAttention)


@pytest.fixture(scope="module")
def nano() -> Sam:
    torch.manual_seed(0)
    return build_sam("tiny_vit_nano", 64)


def encoder_modules(sam: Sam) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in sam.named_modules()
        if name.startswith("image_encoder.") and not list(module.children())
    }


@pytest.mark.parametrize("size", [PUBLISHED, NANO])
def test_every_operator_is_listed_once(size: object) -> None:
    with shapes_alone():
        sam = build_variant("tiny", size)  # type: ignore[arg-type]
    described = sam.description
    for name, module in encoder_modules(sam).items():
        multiplies = isinstance(module, MULTIPLIES)
        quantized = described.place_of(name) is not None
        assert multiplies == (quantized or described.may_multiply(name)), name
        assert not (quantized and described.may_multiply(name)), name
        assert not quantized or type(module) in QUANTIZED, name
        assert multiplies == (type(module) in WORK), name
        # What is neither quantized nor portable would be rounded by each runtime in its own way.
        assert quantized != described.is_portable(name), name
        assert not described.is_portable(name) or type(module) in PORTABLE, name
        if list(module.parameters(recurse=False)) and not multiplies:
            assert described.may_hold(name), name


@pytest.mark.parametrize("size", [PUBLISHED, NANO])
def test_no_pattern_is_dead(size: object) -> None:
    with shapes_alone():
        sam = build_variant("tiny", size)  # type: ignore[arg-type]
    modules = [name for name, _ in sam.named_modules()]
    tensors = [*sam.state_dict(), *(f"{n}.weight.codes" for n in modules)]
    whole = [p.pattern for p in ENCODER.quantized]
    whole += [*ENCODER.stays_float, *ENCODER.tables, *ENCODER.portable]
    for pattern in whole:
        assert any(re.fullmatch(pattern, name) for name in modules), pattern
    paths = [*modules, *tensors, *(f"{name}." for name in modules)]
    for pattern, part in (*ENCODER.parts, *ENCODER.sizes):
        assert any(re.match(pattern, path) for path in paths), part
    assert all(name in tensors for name in ENCODER.origin)


def test_every_weight_has_a_part_and_a_size(nano: Sam) -> None:
    by_part, by_size = defaultdict(list), defaultdict(list)
    for name in nano.state_dict():
        by_part[nano.description.part_of(name)].append(name)
        by_size[nano.description.size_of(name)].append(name)
    assert "other" not in by_part, by_part["other"]
    assert "other" not in by_size, by_size["other"]
    assert all("attention_biases" in name for name in by_part["relative positions"])
    assert all("norm" in name or ".neck." in name for name in by_part["encoder norms"])


@torch.no_grad()
def test_roles_are_what_flows(nano: Sam) -> None:
    """Inputs behind a GELU hold what a GELU gave, and no others do."""
    given: list[Tensor] = []
    found: dict[str, bool] = {}

    def watch(name: str) -> None:
        def look(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            values = inputs[0].flatten().sort().values
            found[name] = any(values.equal(g) for g in given if g.shape == values.shape)

        nano.get_submodule(name).register_forward_pre_hook(look)

    for name, module in encoder_modules(nano).items():
        if isinstance(module, nn.GELU):
            module.register_forward_hook(
                lambda _module, _inputs, output: given.append(output.flatten().sort().values)
            )
        elif isinstance(module, nn.Conv2d | nn.Linear) and nano.description.place_of(name):
            watch(name)
    nano.image_encoder(torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    roles = {name: nano.description.roles(name, INPUT) for name in found}
    assert {n for n, r in roles.items() if "after-gelu" in r} == {n for n, f in found.items() if f}
    assert all("encoder" in r for r in roles.values())


@torch.no_grad()
def test_geometry_is_what_the_encoder_gives(nano: Sam) -> None:
    embedding = nano.image_encoder(torch.zeros(1, 3, 64, 64))
    assert tuple(embedding.shape[1:]) == nano.geometry.features[0]
    assert PUBLISHED.geometry.features == ((256, 64, 64),)
    assert NANO.geometry.features == ((128, 32, 32),)
