"""Float functions by operations that every runtime rounds alike, so that each gets the same bits.

Exponentials, error functions and sums differ between runtimes in their last bits; so do divisions,
which some turn into products, and sums of products, which some round once. What all of them
compute alike is one product, one sum, one reciprocal, one square root of float32 numbers, rounded;
so these functions are made of them, in a stated order. Three habits keep a compiler from joining
operations: a product that is added to something goes through an absolute value or bounds first
(else multiplication and addition may be rounded together), but for products with powers of 2, which
round nothing; quotients are products with reciprocals; sums are of two, or of multiples of one
number that need not be rounded.

Each function takes torch tensors, or whatever has the same methods: the export hands in nodes of a
graph (`deploy/onnx/traced.py`) and so writes what the simulation computes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from ptq4sam.quantization.division import reciprocal

if TYPE_CHECKING:
    from typing_extensions import Self

LARGEST = 3e38
"""A bound that no number exceeds."""
MOST_TERMS = 4096
"""Keys of a softmax, at most: SAM's at 1024 px."""
_DIGIT = 2.0**7
"""Numbers are cut into three whole digits of this base, from -64 to 64."""
LARGEST_DIGIT = 64
FIXED = 2.0**20
"""Largest whole number of three digits."""

# Abramowitz and Stegun, Handbook of Mathematical Functions (1964), 7.1.28: an error function with
# an error of at most 3e-7.
_ERF = (0.0705230784, 0.0422820123, 0.0092705272, 0.0001520143, 0.0002765672, 0.0000430638)
_TANH = 2 * math.sqrt(2 / math.pi)
_EXP_HALVINGS = 5
_HALVES = np.float32(2**12 + 1)
_LARGEST_EXPONENT = 32.0


class Arithmetic(Protocol):
    """What the functions need: float32, each result rounded to the nearest, half to even."""

    # ruff: noqa: D102
    def __add__(self, other: Any, /) -> Self: ...
    def __sub__(self, other: Any, /) -> Self: ...
    def __mul__(self, other: Any, /) -> Self: ...
    def abs(self) -> Self: ...
    def round(self) -> Self: ...
    def sqrt(self) -> Self: ...
    def reciprocal(self) -> Self: ...
    def clamp(self, min: Any = None, max: Any = None) -> Self: ...
    def amax(self, dim: Any, keepdim: bool = False) -> Self: ...
    def sum(self, dim: Any, keepdim: bool = False) -> Self: ...


X = TypeVar("X", bound=Arithmetic)


def apart(x: X) -> X:
    """The same numbers, which no compiler joins with what comes before."""
    return x.clamp(min=-LARGEST)


def at_least(x: X, bound: Any) -> X:
    """1 where x reaches a bound, else 0."""
    given: Any = x
    return cast(
        X, (given >= bound).to(given.dtype) if isinstance(x, Tensor) else given.at_least(bound)
    )


def exp_minus(x: X) -> X:
    """e^-x of x >= 0, to some 1e-6 of itself; from x = 32 on that of 32, 1e-14.

    The quotient of two polynomials (Pade's of orders 3 and 3) of x / 32, squared five times.
    """
    x = x.clamp(max=_LARGEST_EXPONENT) * 2.0**-_EXP_HALVINGS
    square = x * x
    even = (square * 0.1).abs() + 1.0
    odd = (x * ((square * (1 / 120)).abs() + 0.5)).abs()
    power = (even - odd) * _share(even + odd)
    for _ in range(_EXP_HALVINGS):
        power = power * power
    return power


def softmax(logits: X) -> X:
    """Softmax over the last axis, of at most MOST_TERMS numbers.

    Powers are added as whole numbers of 2^-24, in two parts whose sums are exact.
    """
    return softmax_below(logits, logits.amax(-1, keepdim=True))


def softmax_below(logits: X, largest: X) -> X:
    """As `softmax`, with the largest of the logits [..., 1]."""
    powers = exp_minus(largest - logits)
    whole = (powers * 2.0**24).round()
    high = (whole * 2.0**-12).round()
    low = whole - high * 2.0**12
    total = high.sum(-1, keepdim=True) * 2.0**12 + low.sum(-1, keepdim=True)
    return powers * _share(total * 2.0**-24)


def gelu(x: X) -> X:
    """X times the normal distribution up to x, to some 5e-7."""
    size = x.abs()
    scaled = (size * math.sqrt(0.5)).abs()
    power = (scaled * _ERF[-1]).abs() + _ERF[-2]
    for coefficient in (*reversed(_ERF[:-2]), 1.0):
        power = (scaled * power).abs() + coefficient
    for _ in range(4):
        power = power * power
    # Half of 1 - erf.
    tail = _share(power) * 0.5
    return x.clamp(min=0.0) - (size * tail).abs()


def gelu_tanh(x: X) -> X:
    """The approximation of `gelu` by a tangent (Hendrycks and Gimpel, 2016), to some 2e-6.

    Half of 1 - tanh(u) is e^-2u / (1 + e^-2u).
    """
    size = x.abs()
    angle = (size * (((size * size).abs() * (0.044715 * _TANH)).abs() + _TANH)).abs()
    power = exp_minus(angle)
    tail = (power * _share(power + 1.0)).abs()
    return x.clamp(min=0.0) - (size * tail).abs()


def layer_norm(x: X, channels: int, weight: X, bias: X, eps: float) -> X:
    """Normalise over the last axis, of so many channels."""
    share = 1 / channels
    centred = x - apart(whole_sum(x) * share)
    variance = (whole_sum((centred * centred).abs()) * share).abs()
    return apart(centred * _share(_root(variance + eps)) * weight) + bias


def whole_sum(x: X) -> X:
    """Sum over the last axis, of at most 2048 numbers, to [..., 1].

    Each is cut into two multiples of powers of 2 that depend on the largest, by adding and taking
    away a number whose last place such a power is; sums of either are exact. What is left is below
    2^-25 of the largest.
    """
    bound = x.abs().amax(-1, keepdim=True) * 2.0**12
    high = (x + bound) - bound
    rest, bound = x - high, bound * 2.0**-12
    low = (rest + bound) - bound
    return high.sum(-1, keepdim=True) + low.sum(-1, keepdim=True)


def over(x: X, divisor: X) -> X:
    """X times the reciprocal of a divisor above 0."""
    return x * _share(divisor)


def _share(x: X) -> X:
    """1 / x of x > 0, which no compiler joins with a product that follows."""
    return cast(X, reciprocal(x) if isinstance(x, Tensor) else x.reciprocal()).abs()


def _root(x: X) -> X:
    # torch's square roots of float32 on a CPU are MKL's, which are not always rounded right.
    return cast(X, x.double().sqrt().float()) if isinstance(x, Tensor) else x.sqrt()


def digits(whole: X) -> tuple[X, X, X]:
    """Three digits of whole numbers from -FIXED to FIXED, the first one that of the largest power.

    Products of digits are so small that sums of 4096 are exact.
    """
    first = (whole * _DIGIT**-2).round()
    rest = whole - first * _DIGIT**2
    second = (rest * (1 / _DIGIT)).round()
    return first, second, rest - second * _DIGIT


def of_digits(first: X, second: X, third: X) -> X:
    """The number of three digits, or of three sums of products of these: 1 is one of the first."""
    return (third * (1 / _DIGIT) + second) * (1 / _DIGIT) + first


def turn(x: X) -> tuple[X, X]:
    """Sine and cosine of x turns of a circle, to some 1e-6.

    By their series for a quarter of what is left beside whole turns, whose angle is then doubled.
    """
    angle = apart((x - x.round()) * (math.pi / 2))
    square = angle * angle
    sine, cosine = apart(square * (-1 / 72)) + 1.0, apart(square * (-1 / 56)) + 1.0
    for divisors in ((42, 30), (20, 12), (6, 2)):
        sine = apart(square * sine * (-1 / divisors[0])) + 1.0
        cosine = apart(square * cosine * (-1 / divisors[1])) + 1.0
    sine = sine * angle
    for _ in range(2):
        doubled = (sine * sine).abs() * -2.0 + 1.0
        sine, cosine = apart(sine * cosine) * 2.0, doubled
    return sine, cosine


def quotient(x: X, divisor: float | Tensor) -> X:
    """X / divisor, rounded right, without dividing; divisors of a tensor spread over x.

    What the product with the reciprocal leaves is exact in halves of 12 bits (Dekker, 1971), and
    corrects it. Quotients are cut to FIXED.
    """
    held = np.asarray(divisor, np.float32)
    upper = held * _HALVES - (held * _HALVES - held)
    numbers = (np.float32(1) / held, upper, held - upper, held * np.float32(FIXED))
    inverse, high, low, bound = (
        torch.from_numpy(number) if isinstance(divisor, Tensor) else float(number)
        for number in numbers
    )
    x = x.clamp(-bound, bound)
    guess = apart(x * inverse)
    scaled = apart(guess * float(_HALVES))
    top = scaled - (scaled - guess)
    bottom = guess - top
    rest = x
    for factor, part in ((top, high), (top, low), (bottom, high), (bottom, low)):
        # Exact, but a compiler may divide all by the part, subtract, and multiply again.
        rest = rest - apart(factor * part)
    return guess + apart(rest * inverse)


def rounded_sum(terms: Sequence[X]) -> X:
    """The sum of float32 numbers as if rounded once, the largest of them first (Knuth, 1969)."""
    total, *others = terms
    left: X | None = None
    for term in others:
        joined = total + term
        added = joined - total
        error = (total - (joined - added)) + (term - added)
        total, left = joined, error if left is None else left + error
    return total if left is None else total + left


def power_of_two(largest: float) -> float:
    """The smallest power of 2 that is not below; 1 for 0."""
    return 2.0 ** math.ceil(math.log2(largest)) if largest > 0 else 1.0
