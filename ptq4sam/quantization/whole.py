"""Sums of products of whole numbers, exact in floating point whatever their order.

A float32 holds every whole number up to 2^24. While no partial sum of a product can be larger, its
additions round nothing, so that each order of them, on any number of threads, in any kernel, with
or without fused multiplications, gives the integers that a device's accumulators hold. Where a sum
could be larger, a product is cut into pieces that are added in float64, or is float64 itself. In a
linear layer numbers that fit into int8 are multiplied so where the processor is fast at it: the
integers are the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ptq4sam.quantization.fused import fused

EXACT = 2.0**24
"""Largest sum that float32 holds with all whole numbers below it."""
_INT8 = torch.iinfo(torch.int8)
_MOST_PIECES = 8
"""Pieces of a product; what needs more is float64."""


def exact_pieces(weight: Tensor, largest: float) -> int:
    """Into how many pieces of equal length the sums of a layer must be cut; 0 for float64.

    Args:
        weight: [output channels, ...], whole numbers.
        largest: of the inputs that it is multiplied with, absolute.
    """
    rows = weight.flatten(1)
    for count in range(1, _MOST_PIECES + 1):
        norms = [torch.linalg.vector_norm(part, 1, dim=1) for part in _cut(rows, count)]
        if float(torch.stack(norms).max()) * largest <= EXACT:
            return count
    return 0


def _cut(x: Tensor, pieces: int) -> tuple[Tensor, ...]:
    return (x,) if pieces == 1 else x.chunk(pieces, dim=-1)


@functools.cache
def has_int8_products(device: torch.device) -> bool:
    """Whether int8 products here are exact and several times as fast as float32 ones.

    On a CPU with instructions that add four int8 products into an int32; without them sums of two
    may be cut to 16 bits.
    """
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    return device.type == "cpu" and supported is not None and bool(supported())


def _fits_int8(x: Tensor) -> bool:
    """Not where something is not a number, which a product has to show."""
    if x.numel() == 0:
        return False
    low, high = torch.aminmax(x)
    return float(low) >= _INT8.min and float(high) <= _INT8.max


def whole_linear(x: Tensor, weight: Tensor, largest: float) -> Tensor:
    """Sums over k of x and weight, rounded to float32 once.

    Args:
        x: [..., K], whole numbers.
        weight: [n, K], whole numbers.
        largest: of `x`, absolute.

    Returns:
        [..., n].
    """
    if has_int8_products(x.device) and _fits_int8(x) and _fits_int8(weight):
        sums = torch._int_mm(x.reshape(-1, x.shape[-1]).to(torch.int8), weight.to(torch.int8).t())
        return sums.float().reshape(*x.shape[:-1], -1)
    pieces = exact_pieces(weight, largest)
    if pieces == 1:
        return F.linear(x, weight)
    if pieces == 0:
        return F.linear(x.double(), weight.double()).float()
    parts = zip(_cut(x, pieces), _cut(weight, pieces), strict=True)
    return sum((F.linear(a, b).double() for a, b in parts), start=x.new_zeros(())).float()


def whole_convolution(
    convolve: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, largest: float
) -> Tensor:
    """As `whole_linear`, for a convolution with zeros around and one group.

    Args:
        convolve: the convolution without bias, from input and weight.
        x: [batch, channels, height, width], whole numbers.
        weight: [output channels, channels, ...], whole numbers.
        largest: of `x`, absolute.
    """
    if exact_pieces(weight, largest) != 1:
        x, weight = x.double(), weight.double()
    # cuDNN may compute by transforms that round; without it torch multiplies matrices.
    with torch.backends.cudnn.flags(enabled=False):
        return convolve(x, weight).float()


def whole_product(a: Tensor, b: Tensor, largest: float) -> Tensor:
    """The product of a [..., n, K] and b [..., K, m], whole numbers, rounded to float32 once.

    Args:
        a: whole numbers.
        b: whole numbers.
        largest: what no partial sum exceeds.
    """
    if largest <= EXACT and a.dtype == b.dtype:
        return a @ b
    return (a.double() @ b.double()).float()


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


@fused
def _rescaled(sums: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return sums * scale + bias
