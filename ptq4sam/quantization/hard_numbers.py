"""Numbers that are hard to round, with which compiled kernels are compared (see `fused`).

They follow from their places alone: no generator is drawn from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_ELEMENTS = 2**21
_SCALES = 32
_MANTISSA_BITS = 23
_MANTISSAS = 2**_MANTISSA_BITS
_KNUTH = 2_654_435_761
"""Multiplier of a hash (Knuth, The Art of Computer Programming 3, 6.4)."""
_STEPS = 1024
"""Halves of a step on either side of zero."""
_EXPONENTS = 24
"""Powers of 2 below the largest point."""

Arguments = tuple[Any, ...]


def near_steps(scale_at: int) -> Callable[..., Iterator[Arguments]]:
    """For functions of x and a scale: multiples of it, middles of two, neighbours, and others.

    Args:
        scale_at: place of the scale among the arguments, of which x is the first.
    """

    def hard(*args: Any) -> Iterator[Arguments]:
        for given in _with_scales(args, scale_at):
            x, *others = given
            index = _places(x)
            steps = (index % (2 * _STEPS + 1) - _STEPS).float() * 0.5
            near = _neighbours((steps * given[scale_at]).float(), index)
            between = near * _mantissas(index) * 0.5
            yield torch.where(index % 3 == 0, between, near).to(x.dtype), *others

    return hard


def near_points(scale_at: int) -> Callable[..., Iterator[Arguments]]:
    """For functions of softmax outputs, a scale and mantissas behind it: shares at those mantissas.

    Args:
        scale_at: place of the scale among the arguments.
    """

    def hard(*args: Any) -> Iterator[Arguments]:
        for given in _with_scales(args, scale_at):
            x, *others = given
            middles, index = given[scale_at + 1], _places(x)
            exponent = 127 - (index % _EXPONENTS).to(torch.int32)
            share = (exponent << _MANTISSA_BITS) + middles[index // _EXPONENTS % len(middles)]
            near = _neighbours(share.view(torch.float32), index)
            yield (near * given[scale_at]).to(x.dtype), *others

    return hard


def many_sizes(x: Tensor) -> Iterator[Arguments]:
    """For functions of x alone: numbers of all mantissas, 2^-8 to 2^8, of both signs."""
    (x,) = _some((x,), _ELEMENTS)
    yield (numbers(x),)


def numbers(like: Tensor) -> Tensor:
    """Numbers of all mantissas, 2^-8 to 2^8, of both signs, in the shape and type of a tensor."""
    index = _places(like)
    size = _mantissas(index) * torch.exp2((index % 16 - 8).float())
    return torch.where(index % 5 < 2, -size, size).to(like.dtype)


def whole_numbers(like: Tensor) -> Tensor:
    """Whole numbers below 2^23, of both signs, in the shape and type of a tensor."""
    index = _places(like)
    number: Tensor = index * _KNUTH % (2 * _MANTISSAS) - _MANTISSAS
    return number.to(like.dtype)


def some_rows(x: Tensor) -> Tensor:
    """The first rows of [rows, n], as many as are looked at."""
    return x[: max(1, _ELEMENTS // x.shape[1])]


def _with_scales(args: Arguments, scale_at: int) -> Iterator[Arguments]:
    """Some of the elements, with the scale and with others: few are hard to divide by one scale."""
    given = _some(args, _ELEMENTS // _SCALES)
    scale = given[scale_at]
    for index in range(_SCALES):
        other = scale * (1 + index / _SCALES)
        yield *given[:scale_at], other, *given[scale_at + 1 :]


def _some(args: Arguments, elements: int) -> Arguments:
    """The first places of all tensors along the longest axis of the first one."""
    x = args[0]
    axis = max(range(x.dim()), key=lambda axis: x.shape[axis])
    length = x.shape[axis]
    kept = min(length, max(1, elements * length // x.numel()))

    def cut(argument: Any) -> Any:
        alike = (
            isinstance(argument, Tensor)
            and argument.dim() == x.dim()
            and argument.shape[axis] == length
        )
        if not alike:
            return argument
        # A copy in order, as the tensors of other calls lie.
        return argument.narrow(axis, 0, kept).clone(memory_format=torch.contiguous_format)

    return tuple(map(cut, args))


def _places(x: Tensor) -> Tensor:
    return torch.arange(math.prod(x.shape), device=x.device).reshape(x.shape)


def _mantissas(index: Tensor) -> Tensor:
    """From 1 to 2."""
    mantissa: Tensor = index * _KNUTH % _MANTISSAS
    numbers: Tensor = mantissa.float() / _MANTISSAS + 1
    return numbers


def _neighbours(x: Tensor, index: Tensor) -> Tensor:
    """Up to two float32 numbers to either side of `x`; 0 itself."""
    moved = (x.view(torch.int32) + (index // 7 % 5 - 2).to(torch.int32)).view(torch.float32)
    return torch.where(x == 0, x, moved)
