"""Float operators between quantizers, computed in float64 and rounded to float32 once.

Runtimes sum in orders of their own and have exponentials and logarithms of their own. A float32
number that differs in its last bit makes another code of a value in the middle of two, and the
network amplifies that until masks differ. A float64 number that is rounded to float32 is the same
everywhere, but for one in some hundred million. Sums of codes need none of this: they are exact
(`quantization/whole.py`).
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq4sam.quantization.fused import fused
from ptq4sam.sam.common import LayerNorm2d, MLPBlock
from ptq4sam.sam.model import Sam
from ptq4sam.sam.prompt_encoder import PositionEmbeddingRandom


class RoundedLayerNorm(nn.LayerNorm):
    """A layer normalisation in float64; parameter names stay those of nn.LayerNorm."""

    def __init__(self, source: nn.LayerNorm) -> None:
        super().__init__(list(source.normalized_shape), source.eps, device="meta")
        self.weight, self.bias = source.weight, source.bias

    def forward(self, x: Tensor) -> Tensor:
        """Normalise over the last axis; shape and dtype stay."""
        return _layer_norm(x, self.weight, self.bias, self.eps)


class RoundedLayerNorm2d(LayerNorm2d):
    """A layer normalisation over channels in float64; parameter names stay."""

    def __init__(self, source: LayerNorm2d) -> None:
        super().__init__(0, source.eps)
        self.weight, self.bias = source.weight, source.bias

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each position of [batch, channels, height, width]; shape and dtype stay."""
        normalized = _layer_norm(x.permute(0, 2, 3, 1), self.weight, self.bias, self.eps)
        return normalized.permute(0, 3, 1, 2)


class RoundedGELU(nn.GELU):
    """A GELU in float64; in the input's own precision while something is learned."""

    def forward(self, input: Tensor) -> Tensor:
        """Activate each element; shape and dtype stay."""
        # Other dtypes come with autocast; on the meta device costs are counted.
        if torch.is_grad_enabled() or input.dtype != torch.float32 or input.is_meta:
            return super().forward(input)
        return _gelu(input)


class RoundedPatches(nn.Conv2d):
    """A convolution of patches side by side, in float64; parameter names stay."""

    def __init__(self, source: nn.Conv2d) -> None:
        side = cast(tuple[int, int], source.kernel_size)
        super().__init__(source.in_channels, source.out_channels, side, side, device="meta")
        self.weight, self.bias = source.weight, source.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, in_channels, height, width] to [batch, out_channels, rows, columns]."""
        bias = None if self.bias is None else self.bias.double()
        patches = F.conv2d(
            x.double(), self.weight.double(), bias, cast(tuple[int, int], self.stride)
        )
        return patches.to(x.dtype)


class RoundedPositions(PositionEmbeddingRandom):
    """Fourier features of positions in float64; the buffer's name stays."""

    def __init__(self, source: PositionEmbeddingRandom) -> None:
        nn.Module.__init__(self)
        matrix = source.positional_encoding_gaussian_matrix
        self.register_buffer("positional_encoding_gaussian_matrix", matrix)

    def _encode(self, unit: Tensor) -> Tensor:
        matrix = self.positional_encoding_gaussian_matrix
        angles = 2 * math.pi * ((2 * unit - 1).double() @ matrix.double())
        return torch.cat([angles.sin(), angles.cos()], dim=-1).to(unit.dtype)


@fused
def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x.double()).to(x.dtype)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    normalized = F.layer_norm(x.double(), weight.shape, weight.double(), bias.double(), eps)
    return normalized.to(x.dtype)


def round_once(sam: Sam, encoder: bool) -> None:
    """Let what a SAM has between its quantizers compute in float64, in place.

    These are the normalisations, the encoder's patch embedding and GELUs, and the encoding of
    points and boxes. (Softmax and relative positions are so within quantized attentions.)

    Args:
        sam: its parameters stay what they are.
        encoder: whether the image encoder is quantized; a float one is left alone.
    """
    sam.prompt_encoder.pe_layer = RoundedPositions(sam.prompt_encoder.pe_layer)
    parts: list[nn.Module] = [sam.mask_decoder]
    if encoder:
        parts.append(sam.image_encoder)
        patches = sam.image_encoder.patch_embed
        patches.proj = RoundedPatches(patches.proj)
    for part in parts:
        for module in list(part.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.LayerNorm:
                    setattr(module, name, RoundedLayerNorm(child))
                elif type(child) is LayerNorm2d:
                    setattr(module, name, RoundedLayerNorm2d(child))
                elif (
                    type(child) is nn.GELU
                    and child.approximate == "none"
                    and isinstance(module, MLPBlock)
                ):
                    setattr(module, name, RoundedGELU())
