"""Single blocks compute what the published ones compute, folded and not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ptq4sam.families.efficientvit.encoder import Around, AttentionBlock, Backbone, Blocks, Neck
from ptq4sam.families.efficientvit.layers import (
    ConvNorm,
    FusedMBConv,
    LiteMLA,
    MBConv,
    ResBlock,
)
from ptq4sam.families.efficientvit.sizes import L0
from ptq4sam.families.efficientvit.weights import fold_state
from ptq4sam.sam.stages import run_stages

TOLERANCE = 2e-5
TINY_BACKBONE = replace(L0, widths=(8, 16, 32, 64, 128), depths=(1, 1, 1, 1, 1))

BLOCKS: dict[str, Callable[[bool], nn.Module]] = {
    "ConvLayer_3x3_s2_bn_gelu": lambda f: ConvNorm(3, 8, 3, 2, activated=True, folded=f),
    "FusedMBConv_8_16_s2_e4": lambda f: FusedMBConv(8, 16, 2, 4, f),
    "MBConv_8_16_s2_e4_fewer_norm": lambda f: MBConv(8, 16, 2, 4, f),
    "LiteMLA_64_dim32_scale5": lambda f: LiteMLA(64, 32, 5, f),
    "LiteMLA_64_dim32_scale3": lambda f: LiteMLA(64, 32, 3, f),
    "LiteMLA_64_dim32_scale5_quadratic_4x4": lambda f: LiteMLA(64, 32, 5, f),
}


def filled(block: nn.Module, state: dict[str, Tensor], folded: bool) -> nn.Module:
    """A block with a published state dict."""
    if folded:
        # Folds know blocks below a path.
        named = fold_state({f"block.{name}": value for name, value in state.items()})
        state = {name.removeprefix("block."): value for name, value in named.items()}
    block.load_state_dict(state)
    return block.eval()


def check(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("name", list(BLOCKS))
def test_blocks_equal_the_golden_ones(
    name: str,
    folded: bool,
    golden_blocks: Mapping[str, Tensor],
    block_states: dict[str, dict[str, Tensor]],
) -> None:
    block = filled(BLOCKS[name](folded), block_states[name], folded)
    check(block(golden_blocks[f"{name}/in"]), golden_blocks[f"{name}/out"])


@pytest.mark.parametrize("folded", [True, False])
def test_residual_blocks_equal_the_golden_ones(
    folded: bool, golden_blocks: Mapping[str, Tensor], block_states: dict[str, dict[str, Tensor]]
) -> None:
    name = "ResBlock_8"
    block = filled(ResBlock(8, folded), block_states[name], folded)
    x = golden_blocks[f"{name}/in"]
    check(block(x), golden_blocks[f"{name}/out"])
    check(run_stages(Around(block).stages(), (x,))[0], x + golden_blocks[f"{name}/out"])
    name = "EfficientViTBlock_64_dim32_e6_scale5"
    attention = AttentionBlock(64, 32, 5, 6, folded)
    filled(attention, block_states[name], folded)
    x = golden_blocks[f"{name}/in"]
    check(run_stages(attention.stages(), (x,))[0], golden_blocks[f"{name}/out"])


@pytest.mark.parametrize("folded", [True, False])
def test_a_backbone_and_a_neck_equal_the_golden_ones(
    folded: bool, golden_blocks: Mapping[str, Tensor], block_states: dict[str, dict[str, Tensor]]
) -> None:
    backbone = Backbone(TINY_BACKBONE, folded)
    filled(backbone, block_states["tiny_backbone_L"], folded)
    x, maps = golden_blocks["tiny_backbone_L/in"], []
    for index, blocks in enumerate(backbone.stages):
        assert isinstance(blocks, Blocks)
        (x,) = run_stages(blocks.stages(), (x,))
        check(x, golden_blocks[f"tiny_backbone_L/stage{index}"])
        maps.append(x)
    neck = Neck((128, 64, 32), 16, 64, 2, 1, folded)
    filled(neck, block_states["tiny_neck"], folded)
    joined = run_stages(neck.stages(), (maps[4], maps[2], maps[3]))
    assert len(joined) == 1
    check(joined[0][:, :, ::4, ::4], golden_blocks["tiny_neck/out_strided4"])


def test_norms_that_are_not_folded_can_be_trained(
    block_states: dict[str, dict[str, Tensor]],
) -> None:
    block = filled(MBConv(8, 16, 2, 4, False), block_states["MBConv_8_16_s2_e4_fewer_norm"], False)
    block.train()
    with torch.enable_grad():
        block(torch.randn(2, 8, 6, 6)).sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())
