"""TinyViT as the image encoder of a SAM: MobileSAM and TinySAM.

Zhang et al., "Faster Segment Anything" (2023); Shu et al., "TinySAM" (2023). Both have the same
network with weights of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from ptq4sam.families.tiny_vit.layers import (
    Attention,
    ConvNorm,
    MBConv,
    Mlp,
    PatchEmbed,
    PatchMerging,
    from_windows,
    to_windows,
)
from ptq4sam.operators.norm import LayerNorm2d
from ptq4sam.sam.stages import Stage, State, run_stages


class Block(nn.Module):
    """Attention within windows, a filter of each channel, and an MLP."""

    def __init__(self, dim: int, num_heads: int, window_size: int, folded: bool) -> None:
        super().__init__()
        self.window_size = window_size
        self.attn = Attention(dim, num_heads, window_size)
        self.local_conv = ConvNorm(dim, dim, 3, groups=dim, folded=folded)
        self.mlp = Mlp(dim)

    def stages(self) -> list[Stage]:
        """The block's units; the state is ([batch, dim, rows, columns],)."""
        return [
            Stage("attn", self.attn, self._enter_attention, self._leave_attention),
            Stage("local_conv", self.local_conv, _as_it_is, _instead),
            Stage("mlp", self.mlp, _enter_mlp, _leave_mlp),
        ]

    def _enter_attention(self, state: State) -> State:
        return (to_windows(state[0], self.window_size),)

    def _leave_attention(self, state: State, attended: Tensor) -> State:
        (x,) = state
        return (x + from_windows(attended, self.window_size, *x.shape[-2:]),)


class Layer(nn.Module):
    """Blocks of one width, and the merging that leads to the next layer's."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: PatchMerging | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def stages(self) -> list[Stage]:
        """The layer's units; the state is ([batch, dim, rows, columns],)."""
        stages = []
        for index, block in enumerate(self.blocks):
            name = f"blocks.{index}"
            if isinstance(block, Block):
                stages += [stage.below(name) for stage in block.stages()]
            else:
                stages.append(Stage(name, block, _as_it_is, _instead))
        if self.downsample is not None:
            stages.append(Stage("downsample", self.downsample, _as_it_is, _instead))
        return stages


class TinyViT(nn.Module):
    """[batch, 3, height, width] to [batch, out_dim, rows, columns].

    Nothing in it depends on the size of the input.
    """

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_sizes: Sequence[int],
        strides: Sequence[int],
        out_dim: int,
        folded: bool = True,
    ) -> None:
        """Build with random weights.

        Args:
            dims: width of each layer.
            depths: blocks of each layer.
            num_heads: of the layers from the second on; the first has convolutions alone.
            window_sizes: of the same.
            strides: of the merging behind each layer but the last.
            out_dim: channels of the embedding.
            folded: without batch normalisations, as for inference.
        """
        super().__init__()
        self.patch_embed = PatchEmbed(dims[0], folded)
        blocks: list[list[nn.Module]] = [[MBConv(dims[0], folded) for _ in range(depths[0])]]
        for dim, depth, heads, window_size in zip(
            dims[1:], depths[1:], num_heads, window_sizes, strict=True
        ):
            blocks.append([Block(dim, heads, window_size, folded) for _ in range(depth)])
        mergings: list[PatchMerging | None] = [
            PatchMerging(dim, out, stride, folded)
            for dim, out, stride in zip(dims, dims[1:], strides, strict=False)
        ]
        self.layers = nn.ModuleList(map(Layer, blocks, [*mergings, None]))
        self.neck = nn.Sequential(
            nn.Conv2d(dims[-1], out_dim, kernel_size=1, bias=False),
            LayerNorm2d(out_dim),
            nn.Conv2d(out_dim, out_dim, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(out_dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Embed normalised, padded images; see the class for shapes."""
        return run_stages(self.stages(), self.begin(x))[0]

    def begin(self, x: Tensor) -> State:
        """The state before the first stage, from images."""
        return (x,)

    def stages(self) -> list[Stage]:
        """All units in order; the state behind them is the embedding."""
        layers = [
            stage.below(f"layers.{index}")
            for index, layer in enumerate(self.layers)
            for stage in cast(Layer, layer).stages()
        ]
        first = Stage("patch_embed", self.patch_embed, _as_it_is, _instead)
        return [first, *layers, Stage("neck", self.neck, _as_it_is, _instead)]


def _as_it_is(state: State) -> State:
    return state


def _instead(_state: State, answer: Tensor) -> State:
    return (answer,)


def _enter_mlp(state: State) -> State:
    return (state[0].permute(0, 2, 3, 1),)


def _leave_mlp(state: State, changed: Tensor) -> State:
    return (state[0] + changed.permute(0, 3, 1, 2),)
