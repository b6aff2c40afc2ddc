"""Products of int8 matrices, where they are exact and several times as fast as float32 ones."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ptq4sam.errors import is_out_of_memory

_INT8 = torch.iinfo(torch.int8)
_LEVELS = 256
_ROWS = 32
"""Rows that a GPU's product gets at least: its kernels want more than 16."""
_MULTIPLE = 8
"""Rows and columns of a weight come in multiples of this on a GPU."""


def fits_int8(x: Tensor) -> bool:
    """Not where something is not a number, which a product has to show."""
    if x.numel() == 0:
        return False
    low, high = torch.aminmax(x)
    return float(low) >= _INT8.min and float(high) <= _INT8.max


def int8_shift(low: int, high: int) -> int | None:
    """What has to be taken from whole numbers low to high for int8; None where nothing helps."""
    if low >= _INT8.min and high <= _INT8.max:
        return 0
    return low - _INT8.min if high - low < _LEVELS else None


def has_int8_products(weight: Tensor) -> bool:
    """Whether int8 products with a weight [n, K] are exact and fast where it is."""
    if weight.device.type == "cpu":
        return _has_vnni() and gives_exact_int8_products(weight.device)
    fits = all(length % _MULTIPLE == 0 for length in weight.shape)
    return weight.device.type == "cuda" and fits and gives_exact_int8_products(weight.device)


@functools.cache
def _has_vnni() -> bool:
    """Whether a CPU has instructions that add four int8 products into an int32.

    Without them products take longer, and sums of two may be cut to 16 bits.
    """
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    return supported is not None and bool(supported())


@functools.cache
def gives_exact_int8_products(device: torch.device) -> bool:
    """Whether a device multiplies int8 matrices right; it is asked once."""
    places = torch.arange(_ROWS * _LEVELS, device=device).reshape(_ROWS, _LEVELS)
    a = (places * 7 % _LEVELS + _INT8.min).to(torch.int8)
    b = (places * 11 % _LEVELS + _INT8.min).to(torch.int8)
    # The largest sums that there can be, of either sign.
    a[0], b[0], b[1] = _INT8.min, _INT8.min, _INT8.max
    try:
        found = torch._int_mm(a, b.t())
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return False
    return torch.equal(found.double(), a.double() @ b.double().t())


def int8_product(x: Tensor, weight: Tensor, shift: int, shifted: Tensor | None) -> Tensor | None:
    """Sums over k of x and weight, rounded to float32 once.

    Args:
        x: [..., K], whole numbers of which `shift` makes int8.
        weight: int8 [n, K].
        shift: taken from x; see `int8_shift`.
        shifted: int32 [n], shift times the sums of the weight's rows; None where it is 0.

    Returns:
        [..., n]; None where something is not a number, as far as that can be asked for free. Where
        it cannot, rows with such are not numbers either.
    """
    rows = x.reshape(-1, x.shape[-1])
    largest = rows.amax(1, keepdim=True)
    free = _asks_for_free(x)
    if free and math.isnan(float(largest.amax())):
        return None
    codes = (rows - shift if shift else rows).to(torch.int8)
    if not free and len(codes) < _ROWS:
        codes = F.pad(codes, (0, 0, 0, _ROWS - len(codes)))
    sums = torch._int_mm(codes, weight.t())[: len(rows)]
    if shifted is not None:
        sums += shifted
    # Nothing, or not a number.
    found = sums.float() if free else sums + (largest - largest)
    return found.reshape(*x.shape[:-1], -1)


def _asks_for_free(x: Tensor) -> bool:
    """Whether the host waits for nothing when it reads a number of a tensor."""
    return x.device.type == "cpu"
