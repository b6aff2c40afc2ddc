"""Float operators between quantizers, computed so that every runtime gets the same bits.

Runtimes sum in orders of their own and have exponentials and error functions of their own. A
float32 number that differs in its last bit makes another code of a value in the middle of two, and
the network amplifies that until masks differ. So what lies between the quantizers of a quantized
model is made of `quantization/portable.py`'s functions, here and in exported graphs. Sums of codes
need none of this: they are exact (`quantization/whole.py`).

While something is learned, under autocast and where costs are counted these are torch's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from ptq4sam.model.watching import unwatched
from ptq4sam.quantization import portable
from ptq4sam.quantization.fused import fused_exactly
from ptq4sam.quantization.hard_numbers import many_sizes, numbers, some_rows
from ptq4sam.quantization.memo import Memo
from ptq4sam.quantization.portable import (
    FIXED,
    LARGEST_DIGIT,
    digits,
    of_digits,
    power_of_two,
)
from ptq4sam.quantization.whole import WholeConvolution, Windows
from ptq4sam.sam.common import LayerNorm2d, MLPBlock
from ptq4sam.sam.image_encoder import PatchEmbed
from ptq4sam.sam.model import Sam
from ptq4sam.sam.prompt_encoder import PositionEmbeddingRandom

PIXEL_BOUND = 8.0
"""Normalised pixels are cut to it; SAM's are below 2.7."""


def is_portable(x: Tensor) -> bool:
    """Whether portable functions take the place of torch's."""
    return not (torch.is_grad_enabled() or x.dtype != torch.float32 or x.is_meta)


class PortableLayerNorm(nn.LayerNorm):
    """A layer normalisation; parameter names stay those of nn.LayerNorm."""

    def __init__(self, source: nn.LayerNorm) -> None:
        super().__init__(list(source.normalized_shape), source.eps, device="meta")
        self.weight, self.bias = source.weight, source.bias

    def forward(self, input: Tensor) -> Tensor:
        """Normalise over the last axis; shape and dtype stay."""
        if not is_portable(input):
            return super().forward(input)
        return _layer_norm(input, self.weight, self.bias, self.eps)


class PortableLayerNorm2d(LayerNorm2d):
    """A layer normalisation over channels; parameter names stay."""

    def __init__(self, source: LayerNorm2d) -> None:
        super().__init__(0, source.eps)
        self.weight, self.bias = source.weight, source.bias

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each position of [batch, channels, height, width]; shape and dtype stay."""
        if not is_portable(x):
            return super().forward(x)
        normalized = _layer_norm(x.permute(0, 2, 3, 1), self.weight, self.bias, self.eps)
        return normalized.permute(0, 3, 1, 2)


class PortableGELU(nn.GELU):
    """A GELU."""

    def forward(self, input: Tensor) -> Tensor:
        """Activate each element; shape and dtype stay."""
        return _gelu(input) if is_portable(input) else super().forward(input)


class PortablePatches(nn.Conv2d):
    """A convolution of patches side by side; parameter names stay.

    Pixels and weights have 21 bits, as three digits; products of the smallest are left out.
    """

    def __init__(self, source: nn.Conv2d) -> None:
        side = cast(tuple[int, int], source.kernel_size)
        super().__init__(source.in_channels, source.out_channels, side, side, device="meta")
        self.weight, self.bias = source.weight, source.bias
        self._convolutions: Memo[tuple[list[WholeConvolution], float]] = Memo()

    def forward(self, input: Tensor) -> Tensor:
        """Map [batch, in_channels, height, width] to [batch, out_channels, rows, columns]."""
        if not is_portable(input):
            return super().forward(input)
        convolutions, worth = self._convolutions.get(self._make_convolutions, (self.weight,))
        pixels = pixel_digits(input)
        sums = [
            convolve(torch.cat(pixels[:count], 1)) for count, convolve in enumerate(convolutions, 1)
        ]
        patches = of_digits(*sums) * worth
        return patches if self.bias is None else patches + self.bias[:, None, None]

    def _make_convolutions(self) -> tuple[list[WholeConvolution], float]:
        """For each digit of the product, and what the first one is worth."""
        weights, worth = weight_digits(self.weight)
        windows = Windows(stride=cast(tuple[int, int], self.stride))
        return [
            WholeConvolution(weight, -LARGEST_DIGIT, LARGEST_DIGIT, windows)
            for weight in digit_weights(weights)
        ], worth


def pixel_digits(image: portable.X) -> tuple[portable.X, portable.X, portable.X]:
    """Digits of normalised pixels, which are cut to PIXEL_BOUND."""
    return digits((image.clamp(-PIXEL_BOUND, PIXEL_BOUND) * (FIXED / PIXEL_BOUND)).round())


def weight_digits(weight: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], float]:
    """Digits of an embedding's weights, and what 1 in a product of both first digits is worth."""
    bound = power_of_two(float(weight.detach().abs().max()))
    # The first digit counts 2^14 of FIXED.
    worth = (2.0**14 / FIXED) ** 2 * bound * PIXEL_BOUND
    return digits((weight.detach() * (FIXED / bound)).round()), worth


def digit_weights(weights: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """For each digit of the product, what as many first digits of pixels are multiplied with."""
    return [torch.cat(weights[:count][::-1], 1) for count in (1, 2, 3)]


class PortablePositions(PositionEmbeddingRandom):
    """Fourier features of positions; the buffer's name stays."""

    def __init__(self, source: PositionEmbeddingRandom) -> None:
        nn.Module.__init__(self)
        matrix = source.positional_encoding_gaussian_matrix
        self.register_buffer("positional_encoding_gaussian_matrix", matrix)

    def _encode(self, unit: Tensor) -> Tensor:
        x, y = (unit * 2.0 - 1.0).tensor_split(2, dim=-1)
        return torch.cat(waves(x, y, *self.positional_encoding_gaussian_matrix), dim=-1)


def waves(
    x: portable.X, y: portable.X, per_x: portable.X, per_y: portable.X
) -> tuple[portable.X, portable.X]:
    """Sines and cosines [..., n] of positions [..., 1] from -1 to 1, with n turns for each."""
    return portable.turn(portable.apart(x * per_x) + portable.apart(y * per_y))


def portable_softmax(logits: Tensor) -> Tensor:
    """Softmax over the last axis of float32 logits."""
    rows = logits.reshape(-1, logits.shape[-1])
    return _softmax(rows, rows.amax(-1, keepdim=True)).reshape(logits.shape)


def _hard_logits(rows: Tensor, largest: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    rows = numbers(some_rows(rows)) * 0.125
    yield rows, rows.amax(-1, keepdim=True)


@unwatched()
@fused_exactly(_hard_logits)
def _softmax(rows: Tensor, largest: Tensor) -> Tensor:
    return portable.softmax_below(rows, largest)


@unwatched()
@fused_exactly(many_sizes)
def _gelu(x: Tensor) -> Tensor:
    return portable.gelu(x)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    # As torch's own, whose result lies in order: products of what lies otherwise are rounded
    # otherwise, while something is learned.
    rows = x.contiguous().reshape(-1, x.shape[-1])
    return _norm_of_rows(rows, weight, bias, eps).reshape(x.shape)


def _hard_rows(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
    yield numbers(some_rows(x)), numbers(weight), numbers(bias), eps


@unwatched()
@fused_exactly(_hard_rows)
def _norm_of_rows(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return portable.layer_norm(x, len(weight), weight, bias, eps)


def make_portable(sam: Sam, encoder: bool) -> None:
    """Let what a SAM has between its quantizers compute portably, in place.

    These are the normalisations, the encoder's patch embedding and GELUs, and the encoding of
    points and boxes. (Softmax and relative positions are so within quantized attentions.)

    Args:
        sam: its parameters stay what they are.
        encoder: whether the image encoder is quantized; a float one is left alone.
    """
    sam.prompt_encoder.pe_layer = PortablePositions(sam.prompt_encoder.pe_layer)
    make_part_portable(sam.mask_decoder)
    if encoder:
        make_part_portable(sam.image_encoder)


def make_part_portable(part: nn.Module) -> None:
    """Let normalisations, patch embedding and GELUs below `part` compute portably, in place."""
    for module in list(part.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.LayerNorm:
                setattr(module, name, PortableLayerNorm(child))
            elif type(child) is LayerNorm2d:
                setattr(module, name, PortableLayerNorm2d(child))
            elif type(child) is nn.Conv2d and isinstance(module, PatchEmbed):
                setattr(module, name, PortablePatches(child))
            elif (
                type(child) is nn.GELU
                and child.approximate == "none"
                and isinstance(module, MLPBlock)
            ):
                setattr(module, name, PortableGELU())
