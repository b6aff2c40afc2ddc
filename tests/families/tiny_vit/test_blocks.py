"""Single blocks compute what MobileSAM's compute, folded and not."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from ptq4sam.families.tiny_vit.encoder import Block
from ptq4sam.families.tiny_vit.layers import (
    Attention,
    ConvNorm,
    MBConv,
    PatchMerging,
    distances_within,
    from_windows,
    to_windows,
)
from ptq4sam.families.tiny_vit.weights import fold_state
from ptq4sam.sam.stages import run_stages

TOLERANCE = 2e-5

BLOCKS: dict[str, Callable[[bool], nn.Module]] = {
    "tv_Conv2d_BN_8_16_s2": lambda folded: ConvNorm(8, 16, 3, 2, folded=folded),
    "tv_MBConv_16_e4": lambda folded: MBConv(16, folded),
    "tv_PatchMerging_16_32_s2": lambda folded: PatchMerging(16, 32, 2, folded),
    "tv_PatchMerging_16_320_s1": lambda folded: PatchMerging(16, 320, 1, folded),
    "tv_Attention_32_h2_w7": lambda folded: Attention(32, 2, 7),
    "tv_Block_32_h2_w7_res16_padded": lambda folded: Block(32, 2, 7, folded),
    "tv_Block_32_h2_w7_res7_single": lambda folded: Block(32, 2, 7, folded),
}


def fold_within(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fold a block's state dict."""
    folded = fold_state({f"block.{name}": value for name, value in state.items()})
    return {name.removeprefix("block."): value for name, value in folded.items()}


def as_map(tokens: Tensor) -> Tensor:
    """[batch, tokens, dim] of a square grid to [batch, dim, rows, columns]."""
    side = round(tokens.shape[1] ** 0.5)
    return tokens.transpose(1, 2).unflatten(2, (side, side))


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("name", list(BLOCKS))
def test_blocks_equal_the_golden_ones(
    name: str,
    folded: bool,
    golden_blocks: Mapping[str, Tensor],
    block_states: dict[str, dict[str, Tensor]],
) -> None:
    block = BLOCKS[name](folded).eval()
    state = block_states[name]
    block.load_state_dict(fold_within(state) if folded else state)
    x, expected = golden_blocks[f"{name}/in"], golden_blocks[f"{name}/out"]
    if x.dim() == 3 and not isinstance(block, Attention):
        x = as_map(x)
    found = run_stages(block.stages(), (x,))[0] if isinstance(block, Block) else block(x)
    if found.dim() == 4 and expected.dim() == 3:
        found = found.flatten(2).transpose(1, 2)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_biases_are_in_the_published_order(golden_blocks: Mapping[str, Tensor]) -> None:
    assert distances_within(7).equal(golden_blocks["tv_Attention_bias_idxs_w7"])


@pytest.mark.parametrize("size", [(14, 14), (16, 9), (5, 7)])
def test_windows_are_cut_row_by_row_and_come_back(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    rows, columns = -(-size[0] // 7), -(-size[1] // 7)
    padded = nn.functional.pad(x, (0, 7 * columns - size[1], 0, 7 * rows - size[0]))
    windows = to_windows(x, 7).reshape(2, rows, columns, 7, 7, 3)
    for row in range(rows):
        for column in range(columns):
            cut = padded[:, :, 7 * row : 7 * row + 7, 7 * column : 7 * column + 7]
            assert windows[:, row, column].permute(0, 3, 1, 2).equal(cut)
    assert from_windows(to_windows(x, 7), 7, *size).equal(x)


def test_padding_attends(block_states: dict[str, dict[str, Tensor]]) -> None:
    """Zeros of the padding become the norm's bias and take part in the softmax."""
    attention = Attention(32, 2, 7)
    attention.load_state_dict(block_states["tv_Attention_32_h2_w7"])
    windows = torch.randn(1, 49, 32, generator=torch.Generator().manual_seed(0))
    padded = windows.clone()
    padded[:, 35:] = 0
    assert (attention(padded) - attention(windows))[:, :35].abs().max() > 0.1
