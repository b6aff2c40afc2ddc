"""Integer arithmetic of quantized operators: products of codes.

Numbers of SAM's operators, at 8 bits or fewer:

- A sum of K products of codes below 2^8, corrected for two zero points, is made of four terms below
  K * 2^16 each, so that every partial result stays below K * 2^18: within int32 for K <= 8191.
  SAM's longest sums have 5120 (second MLP layer of ViT-H) and 4096 terms (keys of a global
  attention at 1024 px).
- Softmax outputs under adaptive granularity are fixed-point numbers of up to 30 fraction bits (see
  `granularity_table`), whose sums are int64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq4sam.deploy.codes import LogGrid, UniformGrid
from ptq4sam.errors import DeployError

MOST_BITS = 8
"""Bits of the widest codes."""
LONGEST_SUM = 8191
"""Terms of the longest int32 sum of products of two codes."""


def require_narrow(name: str, *grids: UniformGrid | LogGrid, terms: int = 0) -> None:
    """Refuse what int32 sums cannot hold.

    Raises:
        DeployError: codes are wider than 8 bits, or a sum has too many terms.
    """
    bits = max(grid.grid.bits for grid in grids)
    if bits > MOST_BITS or terms > LONGEST_SUM:
        raise DeployError(
            f"{name} has codes of {bits} bits and sums of {terms} products: integer arithmetic in "
            f"32 bits holds {MOST_BITS} bits and {LONGEST_SUM} products"
        )


def affine_product(
    a: Tensor, b: Tensor, a_zero: Tensor | int, b_zero: Tensor | int, dtype: torch.dtype
) -> Tensor:
    """Sum over k of (a - a_zero) (b - b_zero), from the product of the codes alone.

    sum a b - b_zero sum a - a_zero sum b + K a_zero b_zero: hardware multiplies codes as they are
    stored, and corrects the sums.

    Args:
        a: integer codes [..., m, K], as integers or as float64.
        b: integer codes [..., K, n].
        a_zero: zero point, a number or [m, 1].
        b_zero: zero point, a number or [n].
        dtype: of the accumulator, int32 or int64; it must hold the sums.

    Returns:
        [..., m, n] in `dtype`, exact.
    """
    result = _exact_product(a, b).to(dtype)
    sums_a = a.sum(-1, keepdim=True, dtype=a.dtype if a.is_floating_point() else dtype).to(dtype)
    sums_b = b.sum(-2, keepdim=True, dtype=dtype)
    result -= sums_a * b_zero
    result -= sums_b * a_zero
    return result.add_(a.shape[-1] * a_zero * b_zero)


def _exact_product(a: Tensor, b: Tensor) -> Tensor:
    """A product of integers in float64, which is exact while sums stay below 2^53.

    All partial sums are whole numbers that float64 has, so that their order does not matter. torch
    has no fast product of integers for all shapes, and float32 may be set to bfloat16 or TF32.
    """
    return a.to(torch.float64) @ b.to(torch.float64)
