"""Sums of products of whole numbers, exact in floating point whatever their order.

A float32 holds every whole number up to 2^24. While no partial sum of a product can be larger, its
additions round nothing, so that each order of them, on any number of threads, in any kernel, with
or without fused multiplications, gives the integers that a device's accumulators hold. Where a sum
could be larger, or where torch is set to round the factors of float32 products, a product is cut
into pieces that are added in float64, or is float64 itself. Numbers that fit into int8 are
multiplied so where the processor or GPU is fast at it: the integers are the same.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ptq4sam.numerics import float32_products
from ptq4sam.quantization.fused import fused_exactly
from ptq4sam.quantization.hard_numbers import numbers, some_rows, whole_numbers
from ptq4sam.quantization.int8_products import (
    fits_int8,
    has_int8_products,
    int8_product,
    int8_shift,
)
from ptq4sam.quantization.portable import apart

_log = logging.getLogger(__name__)

EXACT = 2.0**24
"""Largest sum that float32 holds with all whole numbers below it."""
LARGEST_ROW = 3.0
"""Sum of a quantized softmax, at most: its outputs add up to 1, a point is at most sqrt(2) times
its output, and the rounding to a whole number at most doubles it."""
_MOST_PIECES = 8
"""Pieces of a product; what needs more is float64."""


def exact_pieces(weight: Tensor, largest: float, most: int = _MOST_PIECES) -> int:
    """Into how many pieces of equal length the sums of a layer must be cut; 0 for float64.

    Args:
        weight: [output channels, ...], whole numbers.
        largest: of the inputs that it is multiplied with, absolute.
        most: pieces, at most.
    """
    rows = weight.flatten(1)
    for count in range(1, most + 1):
        norms = [torch.linalg.vector_norm(part, 1, dim=1) for part in _cut(rows, count)]
        if float(torch.stack(norms).max()) * largest <= EXACT:
            return count
    return 0


def _cut(x: Tensor, pieces: int) -> tuple[Tensor, ...]:
    return (x,) if pieces == 1 else x.chunk(pieces, dim=-1)


def operand(x: Tensor, largest: float) -> Tensor:
    """`x` as an exact product takes it: float64 where float32 sums could be rounded.

    Args:
        x: whole numbers.
        largest: what no partial sum exceeds.
    """
    return x if largest <= EXACT and _rounds_no_factors(x.device) else x.double()


def _rounds_no_factors(device: torch.device) -> bool:
    """Whether float32 products here are those of their factors."""
    products = float32_products(device)
    if products != "ieee":
        _tell_slow(device.type, products)
    return products == "ieee"


@functools.cache
def _tell_slow(kind: str, products: str) -> None:
    _log.warning(
        "float32 products on %s are set to %s, in which whole numbers are not exact: they are "
        'multiplied in float64, which takes longer; torch.set_float32_matmul_precision("highest") '
        "avoids it",
        kind,
        products,
    )


class WholeLinear:
    """Products with one weight of whole numbers; what they need is found out once.

    Args:
        weight: [n, K], whole numbers.
        low: smallest input, at most 0.
        high: largest one, at least 0.
    """

    def __init__(self, weight: Tensor, low: int, high: int) -> None:
        self._pieces = exact_pieces(weight, max(-low, high))
        whole = weight.to(_narrowest(weight))
        shift = int8_shift(low, high) if whole.dtype == torch.int8 else None
        self._shift = shift if has_int8_products(weight) else None
        self._weight = whole
        self._shifted = self._shift * weight.sum(1).to(torch.int32) if self._shift else None

    def __call__(self, x: Tensor) -> Tensor:
        """Sums over k of x [..., K] and the weight, rounded to float32 once: [..., n]."""
        if self._shift is not None and x.numel() > 0:
            sums = int8_product(x, self._weight, self._shift, self._shifted)
            if sums is not None:
                return sums
        weight = self._weight.to(x.dtype)
        pieces = self._pieces if _rounds_no_factors(x.device) else 0
        if pieces == 1:
            return F.linear(x, weight)
        if pieces == 0:
            return F.linear(x.double(), weight.double()).float()
        parts = zip(_cut(x, pieces), _cut(weight, pieces), strict=True)
        return sum((F.linear(a, b).double() for a, b in parts), start=x.new_zeros(())).float()


def _narrowest(x: Tensor) -> torch.dtype:
    """The type of the fewest bytes that holds whole numbers as they are."""
    if fits_int8(x):
        return torch.int8
    # What is no number has to be seen in products.
    exact = [kind for kind in (torch.int16, torch.int32) if torch.equal(x.to(kind).to(x.dtype), x)]
    return exact[0] if exact else x.dtype


@dataclass(frozen=True)
class Windows:
    """Where a convolution with zeros around looks.

    Attributes:
        stride: down and across.
        padding: zeros above and below, left and right.
        dilation: steps between the places of a kernel.
        groups: of channels that have nothing to do with each other.
    """

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def of_torch(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]:
        """As torch.nn.functional.conv2d takes it behind the bias."""
        return self.stride, self.padding, self.dilation, self.groups

    def size(self, kernel: tuple[int, int], height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the output, of an input's height and width."""
        rows, columns = (
            (length + 2 * padding - dilation * (size - 1) - 1) // stride + 1
            for length, size, padding, dilation, stride in zip(
                (height, width), kernel, self.padding, self.dilation, self.stride, strict=True
            )
        )
        return rows, columns


class WholeConvolution:
    """As `WholeLinear`, for a convolution.

    Elsewhere than on a CPU windows are multiplied as rows of a matrix: cuDNN may compute by
    transforms that round, and whether it may use TF32 is one more setting.

    Args:
        weight: [output channels, channels, height, width], whole numbers.
        low: smallest input, at most 0.
        high: largest one, at least 0.
        windows: where it looks.
    """

    def __init__(self, weight: Tensor, low: int, high: int, windows: Windows) -> None:
        self._windows, self._kernel = windows, (weight.shape[2], weight.shape[3])
        self._direct = _has_direct_convolutions(weight.device)
        if self._direct:
            largest = max(-low, high)
            self._weight = weight if exact_pieces(weight, largest) == 1 else weight.double()
        else:
            parts = weight.flatten(1).chunk(windows.groups)
            self._linears = [WholeLinear(part, low, high) for part in parts]

    def __call__(self, x: Tensor) -> Tensor:
        """Map whole numbers [batch, channels, height, width] to sums rounded to float32 once."""
        windows = self._windows
        if self._direct:
            weight = self._weight if _rounds_no_factors(x.device) else self._weight.double()
            return F.conv2d(x.to(weight.dtype), weight, None, *windows.of_torch).float()
        looked_at = F.unfold(x, self._kernel, windows.dilation, windows.padding, windows.stride)
        by_group = looked_at.transpose(1, 2).chunk(windows.groups, -1)
        pairs = zip(self._linears, by_group, strict=True)
        sums = torch.cat([linear(part) for linear, part in pairs], -1).transpose(1, 2)
        size = windows.size(self._kernel, x.shape[2], x.shape[3])
        return sums.reshape(*sums.shape[:2], *size)


def _has_direct_convolutions(device: torch.device) -> bool:
    """Whether convolutions here are sums of products, without transforms."""
    return device.type == "cpu"


def whole_product(a: Tensor, b: Tensor, largest: float) -> Tensor:
    """The product of a [..., n, K] and b [..., K, m], whole numbers, rounded to float32 once.

    Args:
        a: whole numbers.
        b: whole numbers.
        largest: what no partial sum exceeds.
    """
    a, b = operand(a, largest), operand(b, largest)
    if a.dtype != b.dtype:
        a, b = a.double(), b.double()
    return (a @ b).float()


def rescaled(sums: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Make sums * scale + bias in float32, the product rounded before the addition.

    This order is part of what a quantized model is: all that runs it computes so.

    Args:
        sums: [..., n], whole numbers.
        scale: [n] or [], float32.
        bias: [n] or none.

    Returns:
        float32 [..., n].
    """
    if bias is None:
        return sums * scale
    rows = sums.reshape(-1, sums.shape[-1])
    return _rescaled(rows, scale, bias).reshape(sums.shape)


def _hard_sums(
    sums: Tensor, scale: Tensor, bias: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    yield whole_numbers(some_rows(sums)), numbers(scale).abs(), numbers(bias)


@fused_exactly(_hard_sums)
def _rescaled(sums: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return apart(sums * scale) + bias
