"""Addresses are those of the published study, made of the model, and name layers everywhere."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from functools import cache

import pytest
import torch

from ptq4sam.errors import ConfigError
from ptq4sam.families.efficientvit.sizes import L0
from ptq4sam.families.efficientvit.variants import PUBLISHED, build_variant
from ptq4sam.model.audit import audit
from ptq4sam.model.calibration import CalibrationItem
from ptq4sam.model.insertion import QuantizedSam, insert_quantizers
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.operators.base import quantized_operators
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.addresses import Address, select
from ptq4sam.sam.model import Sam
from ptq4sam.skeletons import shapes_alone
from ptq4sam.studies.sensitivity.targets import targets_of
from tests.families.efficientvit.conftest import GOLDEN
from tests.tiny_runs import SCHEMES


@cache
def addresses(name: str) -> dict[str, Address]:
    with shapes_alone():
        sam = build_variant(name, PUBLISHED[name])
    found = ((path, sam.description.address_of(path)) for path, _ in sam.named_modules())
    return {path: address for path, address in found if address is not None}


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_addresses_are_the_published_ones(name: str) -> None:
    """Of all convolutions; the attention's arithmetic has one too."""
    known = addresses(name)
    lines = [
        f"{path.removeprefix('image_encoder.').removesuffix('.conv')} {address}"
        for path, address in known.items()
        if not path.endswith(".core")
    ]
    published = json.loads((GOLDEN / "lists.json").read_text())[name]
    assert len(lines) == published["layers"]
    in_order = sorted(lines)
    assert hashlib.sha256("\n".join(in_order).encode()).hexdigest() == published["sorted_sha256"]
    assert len(set(map(str, known.values()))) == published["addresses"]


def test_kinds_are_what_the_layers_are() -> None:
    known = addresses("efficientvit_sam_l0")
    blocks, attentions = L0.depths[3], L0.depths[4]
    assert Counter(address.kind for address in known.values()) == {
        "stem": 1,
        "residual": 2,
        "fused": 2 * (2 + 2 + L0.neck_depth),
        **dict.fromkeys(("expand", "depthwise", "project"), blocks + 1 + attentions + 1),
        "qkv": 3 * attentions,
        "product": attentions,
        "proj": attentions,
        "join": 3,
        "output": 1,
    }


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("any:all:all:all", 73),
        ("L0:all:all:all", 73),
        ("efficientvit_sam_l0:neck:all:all", 12),
        ("any:all_but_neck:all:all", 61),
        ("any:none:none:none", 0),
        ("any:stage3,stage4:0:depthwise,project", 4),
        ("any:stage4:1,2:0", 6),
        ("any:neck:7:0", 1),
    ],
)
def test_lists_and_sets(text: str, count: int) -> None:
    assert len(select(text, "efficientvit_sam_l0", addresses("efficientvit_sam_l0"))) == count


def test_an_empty_list_names_nothing_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert not select("any:stage3::1", "efficientvit_sam_l0", addresses("efficientvit_sam_l0"))
    assert "any:stage3::1 names nothing: its list of blocks is empty" in caplog.text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("any:stage5:0:0", "no stage is 'stage5'; did you mean 'stage"),
        ("any:all:all:depthwize", "did you mean 'depthwise'"),
        ("any:stage3:1:4", "no such layer; did you mean 'any:stage4:1:4'"),
        ("L1:stage3:1:1", "is of another model: this is L0"),
    ],
)
def test_what_there_is_not_is_refused_with_the_nearest(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        select(text, "efficientvit_sam_l0", addresses("efficientvit_sam_l0"))


def scheme(**units: int | str) -> Scheme:
    read = Scheme.from_yaml(SCHEMES / "w8a8.yaml")
    return read.with_overrides("w_qconfig.observer=MinMaxObserver").with_units(units)


def quantized_layers(sam: QuantizedSam) -> dict[str, int]:
    return {name: next(iter(o.slots().values())).grid.bits for name, o in quantized_operators(sam)}


def test_a_scheme_excepts_layers(tiny: Sam, items: list[CalibrationItem]) -> None:
    units: dict[str, int | str] = {
        "any:all:all:depthwise,project": "float",
        "any:stage3:1:project": 4,
        "any:neck:all:all": "w4a8",
    }
    with torch.enable_grad():
        found = quantize_sam(tiny, items, scheme(**units))
    bits = quantized_layers(found)
    left = [name for name in bits if "depth_conv" in name]
    projected = [name for name in bits if "point_conv" in name and "stages" in name]
    assert not left
    assert bits["image_encoder.backbone.stages.3.op_list.1.main.point_conv.conv"] == 4
    assert "image_encoder.backbone.stages.4.op_list.0.main.point_conv.conv" not in projected
    assert bits["image_encoder.backbone.stages.4.op_list.0.main.inverted_conv.conv"] == 8
    assert bits["image_encoder.neck.output_ops.0.op_list.0.conv"] == 4
    item = items[0]

    def forward() -> tuple[torch.Tensor, ...]:
        return found.decode(found.embed(item.pixels), None, item.boxes, None, True)

    report = audit(found, forward)
    assert report.passed, "\n".join(report.lines())
    assert report.kept == units


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("any:stage9:0:0", r"units.any:stage9:0:0: no stage is 'stage9'"),
        ("any:stage0:0:0", "stays float in every scheme"),
    ],
)
def test_exceptions_that_are_none_are_refused(tiny: Sam, address: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        insert_quantizers(tiny, scheme(**{address: 4}))


def test_models_without_addresses_say_so() -> None:
    from ptq4sam.families import build_sam

    with pytest.raises(ConfigError, match="has no addresses"):
        insert_quantizers(build_sam("vit_nano"), scheme(**{"any:all:all:all": 4}))


def test_targets_are_layers(tiny: Sam) -> None:
    found = insert_quantizers(tiny, scheme())
    layers = targets_of(found, ("layer",), ())
    # The stem stays float; qkv and both aggregations are one.
    known = {str(address) for address in found.addresses().values()} - {"stage0:0:0"}
    assert [t.path for t in layers] == list(dict.fromkeys(t.path for t in layers))
    assert {t.path.partition(":")[2] for t in layers} == known
    (qkv,) = targets_of(found, ("layer",), (), ["any:stage4:1:qkv"])
    assert qkv.name.endswith(":stage4:1:0")
    assert len(qkv.quantizers) == 6
    assert qkv.place == ("image_encoder", "stage4:1", "0")
    (weights,) = targets_of(found, ("layer",), ("weights",), ["any:stage4:1:qkv:weights"])
    assert len(weights.quantizers) == 3
    with pytest.raises(ConfigError, match="ask for the grain layer"):
        targets_of(found, ("unit",), (), ["any:all:all:all"])
    with pytest.raises(ConfigError, match="names no layer that is quantized"):
        targets_of(found, ("layer",), (), ["any:stage0:0:0"])
