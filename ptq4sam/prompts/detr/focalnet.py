"""FocalNet (Yang et al., "Focal Modulation Networks", 2022) as the backbone of a detector.

The variant of the published detectors: overlapping patches, norms after modulation and MLP,
layer scale, and a modulator that is divided by its number of parts. Parameters have the names of
the authors' code (github.com/microsoft/FocalNet); arithmetic was tested against FocalNet of
transformers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

_MLP_RATIO = 4
_WINDOW_STEP = 2


@dataclass(frozen=True)
class FocalNetConfig:
    """Sizes; the defaults are those of FocalNet-L with four focal levels.

    Attributes:
        dim: channels of the first stage; each further one has twice as many.
        depths: blocks of each stage.
        focal_levels: depth-wise convolutions, one after another, of each modulation.
        focal_window: kernel of the first one, in cells; each further one is larger by 2.
    """

    dim: int = 192
    depths: tuple[int, ...] = (2, 2, 18, 2)
    focal_levels: int = 4
    focal_window: int = 3

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.dim * 2**stage for stage in range(len(self.depths)))


class _Modulation(nn.Module):
    """Focal modulation (equations 4 to 6): [batch, h, w, dim] to the same."""

    def __init__(self, dim: int, levels: int, window: int) -> None:
        super().__init__()
        self.parts = levels + 1
        self.f = nn.Linear(dim, 2 * dim + self.parts)
        self.h = nn.Conv2d(dim, dim, 1)
        self.proj = nn.Linear(dim, dim)
        kernels = range(window, window + _WINDOW_STEP * levels, _WINDOW_STEP)
        self.focal_layers = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(dim, dim, size, padding=size // 2, groups=dim, bias=False), nn.GELU()
            )
            for size in kernels
        )

    def forward(self, x: Tensor) -> Tensor:
        dim = x.shape[-1]
        query, context, gates = self.f(x).permute(0, 3, 1, 2).split([dim, dim, self.parts], dim=1)
        parts = gates.unbind(1)
        gathered = torch.zeros_like(context)
        for layer, gate in zip(self.focal_layers, parts, strict=False):
            context = layer(context)
            gathered = gathered + context * gate[:, None]
        everywhere = functional.gelu(context.mean(dim=(2, 3), keepdim=True))
        gathered = (gathered + everywhere * parts[-1][:, None]) / self.parts
        modulated = query * self.h(gathered)
        out: Tensor = self.proj(modulated.permute(0, 2, 3, 1))
        return out


class _FeedForward(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, _MLP_RATIO * dim)
        self.fc2 = nn.Linear(_MLP_RATIO * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(functional.gelu(self.fc1(x)))
        return out


class _Block(nn.Module):
    """Modulation and MLP, each with a norm behind it; [batch, h, w, dim]."""

    def __init__(self, dim: int, levels: int, window: int) -> None:
        super().__init__()
        self.modulation = _Modulation(dim, levels, window)
        self.norm1 = nn.LayerNorm(dim)
        self.gamma_1 = nn.Parameter(torch.ones(dim))
        self.mlp = _FeedForward(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.gamma_2 = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma_1 * self.norm1(self.modulation(x))
        out: Tensor = x + self.gamma_2 * self.norm2(self.mlp(x))
        return out


class _Patches(nn.Module):
    """Overlapping patches by a strided convolution: [batch, h, w, in] to [batch, h', w', out]."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.stride = stride
        self.proj = nn.Conv2d(inputs, outputs, kernel, stride, padding)
        self.norm = nn.LayerNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)
        height, width = (-side % self.stride for side in x.shape[2:])
        x = self.proj(functional.pad(x, (0, width, 0, height)))
        out: Tensor = self.norm(x.permute(0, 2, 3, 1))
        return out


class _Stage(nn.Module):
    """Blocks, and the patches that lead to the next stage; the last one has none."""

    def __init__(self, c: FocalNetConfig, stage: int) -> None:
        super().__init__()
        dim = c.channels[stage]
        self.blocks = nn.ModuleList(
            _Block(dim, c.focal_levels, c.focal_window) for _ in range(c.depths[stage])
        )
        self.downsample: _Patches | None = None
        if stage + 1 < len(c.depths):
            self.downsample = _Patches(dim, 2 * dim, kernel=3, stride=2, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            x = block(x)
        return x, x if self.downsample is None else self.downsample(x)


class FocalNet(nn.Module):
    """Features of all stages, each through a norm of its own.

    Args:
        config: sizes.
    """

    def __init__(self, config: FocalNetConfig) -> None:
        super().__init__()
        self.patch_embed = _Patches(3, config.dim, kernel=7, stride=4, padding=2)
        self.layers = nn.ModuleList(_Stage(config, stage) for stage in range(len(config.depths)))
        for stage, channels in enumerate(config.channels):
            self.add_module(f"norm{stage}", nn.LayerNorm(channels))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images [batch, 3, h, w] to features [batch, channels, h / 4 ... h / 32, w / 4 ...]."""
        x = self.patch_embed(images.permute(0, 2, 3, 1))
        features = []
        for number, stage in enumerate(self.layers):
            found, x = stage(x)
            features.append(self.get_submodule(f"norm{number}")(found).permute(0, 3, 1, 2))
        return features
