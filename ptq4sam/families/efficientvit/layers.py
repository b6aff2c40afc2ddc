"""What EfficientViT is made of; parameter names are those of the published checkpoints.

Cai et al., "EfficientViT: Multi-Scale Linear Attention for High-Resolution Dense Prediction"
(2023), section 3. Every batch normalisation is behind a convolution, into which inference folds it
(see `weights`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptq4sam.operators.activation import ChannelGELU
from ptq4sam.operators.linear_attention import ReluLinearAttention

NORM_EPS = 1e-6
"""Of all normalisations, those of the mask decoder's transformer too."""


class ConvNorm(nn.Module):
    """A convolution that keeps the size but for its stride, perhaps normalised and activated.

    A normalisation that is folded is the convolution's bias.

    Args:
        in_channels: of the input.
        channels: of the output.
        kernel_size: of the convolution.
        stride: of the convolution.
        groups: of the convolution.
        bias: whether one without normalisation has a bias; None for one with a normalisation.
        activated: whether a GELU, approximated by a tangent, is behind it.
        scaled: whether channels behind that get factors where it is quantized.
        folded: whether the normalisation is in the convolution.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        *,
        bias: bool | None = None,
        activated: bool = False,
        scaled: bool = False,
        folded: bool = True,
    ) -> None:
        super().__init__()
        normalized = bias is None
        self.conv = nn.Conv2d(
            in_channels,
            channels,
            kernel_size,
            stride,
            padding=kernel_size // 2,
            groups=groups,
            bias=folded if normalized else bool(bias),
        )
        self.norm = nn.BatchNorm2d(channels, NORM_EPS) if normalized and not folded else None
        act = ChannelGELU(channels, "tanh") if scaled else nn.GELU(approximate="tanh")
        self.act = act if activated else None

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, in_channels, height, width] to [batch, channels, height', width']."""
        x = self.conv(x)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.act is None else self.act(x)


class ResBlock(nn.Module):
    """Two convolutions of the same width: [batch, dim, rows, columns] to the same shape."""

    def __init__(self, dim: int, folded: bool) -> None:
        super().__init__()
        self.conv1 = ConvNorm(dim, dim, 3, activated=True, folded=folded)
        self.conv2 = ConvNorm(dim, dim, 3, folded=folded)

    def forward(self, x: Tensor) -> Tensor:
        """Filter; see the class for shapes."""
        filtered: Tensor = self.conv2(self.conv1(x))
        return filtered


class FusedMBConv(nn.Module):
    """Widen by a whole convolution, then narrow: [batch, out_dim, rows / s, columns / s]."""

    def __init__(self, dim: int, out_dim: int, stride: int, expansion: float, folded: bool) -> None:
        super().__init__()
        hidden = round(dim * expansion)
        self.spatial_conv = ConvNorm(
            dim, hidden, 3, stride, activated=True, scaled=True, folded=folded
        )
        self.point_conv = ConvNorm(hidden, out_dim, folded=folded)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, dim, rows, columns]; see the class for the result."""
        mixed: Tensor = self.point_conv(self.spatial_conv(x))
        return mixed


class MBConv(nn.Module):
    """Widen, filter each channel, narrow: [batch, out_dim, rows / s, columns / s].

    Only what is narrowed is normalised.
    """

    def __init__(self, dim: int, out_dim: int, stride: int, expansion: float, folded: bool) -> None:
        super().__init__()
        hidden = round(dim * expansion)
        self.inverted_conv = ConvNorm(dim, hidden, bias=True, activated=True)
        self.depth_conv = ConvNorm(
            hidden, hidden, 3, stride, groups=hidden, bias=True, activated=True, scaled=True
        )
        self.point_conv = ConvNorm(hidden, out_dim, folded=folded)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, dim, rows, columns]; see the class for the result."""
        mixed: Tensor = self.point_conv(self.depth_conv(self.inverted_conv(x)))
        return mixed


class LiteMLA(nn.Module):
    """Linear attention of all positions, at two scales.

    Heads of the second scale attend with queries, keys and values that are mixed from those around.
    """

    def __init__(self, dim: int, head_dim: int, kernel_size: int, folded: bool) -> None:
        super().__init__()
        self.head_dim = head_dim
        three = 3 * dim
        self.qkv = ConvNorm(dim, three, bias=False)
        around = nn.Conv2d(
            three, three, kernel_size, padding=kernel_size // 2, groups=three, bias=False
        )
        within = nn.Conv2d(three, three, 1, groups=three // head_dim, bias=False)
        self.aggreg = nn.ModuleList([nn.Sequential(around, within)])
        self.core = ReluLinearAttention()
        self.proj = ConvNorm(2 * dim, dim, folded=folded)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, dim, rows, columns] to the same shape."""
        batch, _, rows, columns = x.shape
        qkv = self.qkv(x)
        both = torch.cat([qkv, *(mix(qkv) for mix in self.aggreg)], dim=1)
        # Of each head its query, key and value, one behind the other.
        heads = both.reshape(batch, -1, 3 * self.head_dim, rows * columns).transpose(-1, -2)
        query, key, value = heads.tensor_split(3, dim=-1)
        attended = self.core(query, key, value).transpose(-1, -2)
        projected: Tensor = self.proj(attended.reshape(batch, -1, rows, columns))
        return projected
