"""Quotients that compiled kernels round as torch does.

Triton divides float32 numbers by an approximation that is up to 2 units in the last place off, even
where the quotient is a float32 (triton's issue 10661: 4.6875 / 0.9375 gives 5.0000005): codes in
the middle of two, and those of whole numbers of steps that are rounded down, would differ from what
torch computes one by one, and from a CPU's. Quotients of float64 numbers it rounds right; rounded
again to float32 they are those of float32, since 53 bits are more than twice 24 and 1 (Figueroa,
"When is double rounding innocuous?", 1995).
"""

from __future__ import annotations

import torch
from torch import Tensor


def divided(x: Tensor, divisor: Tensor) -> Tensor:
    """`x / divisor`, rounded to the nearest in a kernel too."""
    if _approximate(x):
        dtype = torch.promote_types(x.dtype, divisor.dtype)
        return (x.double() / divisor.double()).to(dtype)
    return x / divisor


def reciprocal(x: Tensor) -> Tensor:
    """1 / x, rounded to the nearest in a kernel too."""
    return x.double().reciprocal().to(x.dtype) if _approximate(x) else x.reciprocal()


def _approximate(x: Tensor) -> bool:
    """Whether the quotients of a kernel that is being compiled for `x` would be."""
    return torch.compiler.is_compiling() and x.device.type != "cpu"
