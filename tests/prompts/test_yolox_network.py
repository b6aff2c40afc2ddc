"""The networks have the names, shapes and sizes that YOLOX's authors published."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from torch import nn

from ptq4sam.prompts.yolox_network import SIZES, YoloxNetwork, folded
from ptq4sam.skeletons import shapes_alone
from tests.prompts.yolox_fixtures import random_network

MILLIONS = {"nano": 0.91, "tiny": 5.06, "s": 8.97, "m": 25.3, "l": 54.2, "x": 99.1}
"""Parameters as in the tables of the paper and of the authors' repository."""

# Blocks of convolution and batch norm by their official names. "D" stands for a 3x3 block, which
# is itself a block or, in nano, the two blocks dconv and pconv; 1..n counts bottlenecks.
BLOCKS = """
backbone.backbone.stem.conv
backbone.backbone.dark{2,3,4,5}.0.D
backbone.backbone.dark{2,3,4}.1.conv{1,2,3}
backbone.backbone.dark2.1.m.{n}.conv1
backbone.backbone.dark2.1.m.{n}.conv2.D
backbone.backbone.dark{3,4}.1.m.{3n}.conv1
backbone.backbone.dark{3,4}.1.m.{3n}.conv2.D
backbone.backbone.dark5.1.conv{1,2}
backbone.backbone.dark5.2.conv{1,2,3}
backbone.backbone.dark5.2.m.{n}.conv1
backbone.backbone.dark5.2.m.{n}.conv2.D
backbone.{lateral_conv0,reduce_conv1}
backbone.bu_conv{1,2}.D
backbone.C3_{p3,p4,n3,n4}.conv{1,2,3}
backbone.C3_{p3,p4,n3,n4}.m.{n}.conv1
backbone.C3_{p3,p4,n3,n4}.m.{n}.conv2.D
head.stems.{0,1,2}
head.{cls,reg}_convs.{0,1,2}.{0,1}.D
"""
IN_A_BLOCK = "{conv.weight,bn.weight,bn.bias,bn.running_mean,bn.running_var,bn.num_batches_tracked}"
PREDICTIONS = "head.{cls,reg,obj}_preds.{0,1,2}.{weight,bias}"


def expand(pattern: str) -> list[str]:
    """Every name that braces stand for, as in a shell."""
    pieces = re.split(r"\{(.*?)\}", pattern)
    choices = [p.split(",") if i % 2 else [p] for i, p in enumerate(pieces)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def official_names(depth: int, depthwise: bool) -> set[str]:
    """Names in a published state dict."""
    text = BLOCKS.replace(".D", ".{dconv,pconv}" if depthwise else "")
    for word, count in (("{n}", depth), ("{3n}", 3 * depth)):
        text = text.replace(word, "{" + ",".join(map(str, range(count))) + "}")
    blocks = [name for pattern in text.split() for name in expand(pattern)]
    return {f"{block}.{rest}" for block in blocks for rest in expand(IN_A_BLOCK)} | set(
        expand(PREDICTIONS)
    )


@pytest.mark.parametrize(
    ("name", "width", "depth"),
    [("nano", 16, 1), ("tiny", 24, 1), ("s", 32, 1), ("m", 48, 2), ("l", 64, 3), ("x", 80, 4)],
)
def test_published_names_shapes_and_number_of_parameters(name: str, width: int, depth: int) -> None:
    with shapes_alone():
        network = YoloxNetwork(SIZES[name])
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count / 1e6 == pytest.approx(MILLIONS[name], abs=0.006 if count < 1e7 else 0.06)
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    nano = name == "nano"
    assert shapes.keys() == official_names(depth, nano)
    three, w = ".pconv" if nano else "", width
    assert shapes["backbone.backbone.stem.conv.conv.weight"] == (w, 12, 3, 3)
    side = 1 if nano else 3
    dark5 = shapes[f"backbone.backbone.dark5.0{three}.conv.weight"]
    assert dark5 == (16 * w, 8 * w, side, side)
    assert shapes["backbone.backbone.dark5.1.conv2.conv.weight"] == (16 * w, 32 * w, 1, 1)
    assert shapes["backbone.lateral_conv0.conv.weight"] == (8 * w, 16 * w, 1, 1)
    assert shapes["backbone.C3_n3.conv3.conv.weight"] == (8 * w, 8 * w, 1, 1)
    assert shapes["head.stems.2.conv.weight"] == (4 * w, 16 * w, 1, 1)
    assert shapes["head.cls_preds.0.weight"] == (80, 4 * w, 1, 1)
    assert shapes["head.reg_preds.1.bias"] == (4,)
    if nano:
        assert shapes["head.reg_convs.0.0.dconv.conv.weight"] == (64, 1, 3, 3)


def test_batch_norms_have_the_authors_epsilon() -> None:
    norms = [m for m in YoloxNetwork(SIZES["nano"]).modules() if isinstance(m, nn.BatchNorm2d)]
    assert {norm.eps for norm in norms} == {1e-3}


@pytest.mark.parametrize("name", ["nano", "s"])
def test_folding_changes_nothing_but_the_number_of_operations(name: str) -> None:
    network = random_network(SIZES[name], classes=3)
    images = torch.rand(1, 3, 64, 96) * 255
    with torch.no_grad():
        rows, again = network(images), folded(network)(images)
    assert rows.shape == (1, 8 * 12 + 4 * 6 + 2 * 3, 8)
    assert rows.std() > 0.1
    torch.testing.assert_close(again, rows, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded(network).modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
