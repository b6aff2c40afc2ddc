"""What TinyViT is made of; parameter names are those of the published checkpoints.

Wu et al., "TinyViT: Fast Pretraining Distillation for Small Vision Transformers" (2022), section
3.2. Every convolution has a batch normalisation behind it, which inference folds into it (see
`weights`).
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq4sam.operators.attention import SoftmaxAttention
from ptq4sam.operators.bias import TableBias

EXPANSION = 4
"""How many times wider the inside of a convolution block or an MLP is."""


class ConvNorm(nn.Sequential):
    """A convolution that keeps the size but for its stride, and its normalisation.

    Folded it is one convolution with a bias, `c`; as it is trained, `c` has none and `bn` follows.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        folded: bool = True,
    ) -> None:
        convolution = nn.Conv2d(
            in_channels,
            channels,
            kernel_size,
            stride,
            padding=kernel_size // 2,
            groups=groups,
            bias=folded,
        )
        layers: dict[str, nn.Module] = {"c": convolution}
        if not folded:
            layers["bn"] = nn.BatchNorm2d(channels)
        super().__init__(OrderedDict(layers))


class PatchEmbed(nn.Module):
    """Two strided convolutions: [batch, 3, height, width] to [batch, dim, height/4, width/4]."""

    def __init__(self, dim: int, folded: bool) -> None:
        super().__init__()
        self.seq = nn.Sequential(
            ConvNorm(3, dim // 2, 3, stride=2, folded=folded),
            nn.GELU(),
            ConvNorm(dim // 2, dim, 3, stride=2, folded=folded),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Embed normalised, padded images."""
        embedded: Tensor = self.seq(x)
        return embedded


class MBConv(nn.Module):
    """Widen, filter each channel, narrow, and add the input; the last GELU is behind the sum."""

    def __init__(self, dim: int, folded: bool) -> None:
        super().__init__()
        hidden = EXPANSION * dim
        self.conv1 = ConvNorm(dim, hidden, 1, folded=folded)
        self.act1 = nn.GELU()
        self.conv2 = ConvNorm(hidden, hidden, 3, groups=hidden, folded=folded)
        self.act2 = nn.GELU()
        self.conv3 = ConvNorm(hidden, dim, 1, folded=folded)
        self.act3 = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, dim, rows, columns] to the same shape."""
        hidden = self.act1(self.conv1(x))
        hidden = self.act2(self.conv2(hidden))
        activated: Tensor = self.act3(x + self.conv3(hidden))
        return activated


class PatchMerging(nn.Module):
    """From one layer's width to the next one's: [batch, dim, r, c] to [batch, out, r/s, c/s]."""

    def __init__(self, dim: int, out_dim: int, stride: int, folded: bool) -> None:
        super().__init__()
        self.conv1 = ConvNorm(dim, out_dim, 1, folded=folded)
        self.act1 = nn.GELU()
        self.conv2 = ConvNorm(out_dim, out_dim, 3, stride, groups=out_dim, folded=folded)
        self.act2 = nn.GELU()
        self.conv3 = ConvNorm(out_dim, out_dim, 1, folded=folded)

    def forward(self, x: Tensor) -> Tensor:
        """Merge; see the class for shapes."""
        hidden = self.act1(self.conv1(x))
        hidden = self.act2(self.conv2(hidden))
        merged: Tensor = self.conv3(hidden)
        return merged


class Attention(nn.Module):
    """Self-attention within windows, with a learned bias for each distance of two positions."""

    def __init__(self, dim: int, num_heads: int, window_size: int) -> None:
        super().__init__()
        self.num_heads, self.window_size = num_heads, window_size
        self.head_dim = dim // num_heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, window_size**2))
        self.core = SoftmaxAttention(self.head_dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within each window of [windows, window_size ** 2, dim]."""
        windows, tokens, dim = x.shape
        # Of each head its query, key and value, side by side.
        heads = self.qkv(self.norm(x)).reshape(windows, tokens, self.num_heads, 3 * self.head_dim)
        query, key, value = heads.transpose(1, 2).split(self.head_dim, dim=-1)
        distances = distances_within(self.window_size, self.attention_biases.device)
        bias = TableBias(self.attention_biases[:, distances])
        attended = self.core(query, key, value, bias)
        projected: Tensor = self.proj(attended.transpose(1, 2).reshape(windows, tokens, dim))
        return projected


def distances_within(window_size: int, device: torch.device | str = "cpu") -> Tensor:
    """The column of the bias table for two positions: their row distance, then column distance.

    Returns:
        [window_size ** 2, window_size ** 2], below window_size ** 2.
    """
    place = torch.arange(window_size, device=device)
    apart = (place[:, None] - place[None, :]).abs()
    by_rows, by_columns = apart[:, None, :, None], apart[None, :, None, :]
    return (window_size * by_rows + by_columns).reshape(window_size**2, window_size**2)


class Mlp(nn.Module):
    """A layer normalisation and two linear layers with a GELU between them, on the last axis."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, EXPANSION * dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(EXPANSION * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., dim] to [..., dim]."""
        projected: Tensor = self.fc2(self.act(self.fc1(self.norm(x))))
        return projected


def to_windows(x: Tensor, window_size: int) -> Tensor:
    """Cut [batch, dim, rows, columns] into windows, padded with zeros at the right and bottom.

    Returns:
        [batch * windows, window_size ** 2, dim].
    """
    batch, dim, rows, columns = x.shape
    x = F.pad(x, (0, -columns % window_size, 0, -rows % window_size))
    down, across = -(-rows // window_size), -(-columns // window_size)
    x = x.reshape(batch, dim, down, window_size, across, window_size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(-1, window_size**2, dim)


def from_windows(windows: Tensor, window_size: int, rows: int, columns: int) -> Tensor:
    """Undo `to_windows`: [batch, dim, rows, columns]."""
    dim = windows.shape[-1]
    down, across = -(-rows // window_size), -(-columns // window_size)
    x = windows.reshape(-1, down, across, window_size, window_size, dim)
    x = x.permute(0, 5, 1, 3, 2, 4)
    x = x.reshape(-1, dim, down * window_size, across * window_size)
    return x[:, :, :rows, :columns]
