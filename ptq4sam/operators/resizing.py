"""Bicubic resizing, and the form of it that every runtime computes alike."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq4sam.operators.arithmetic import whole_numbers
from ptq4sam.operators.base import PortableOperator, portable_form
from ptq4sam.quantization.portable import apart

_A = -0.75
"""Of the cubic kernel (Keys, 1981), as torch and ONNX have it."""

Taps = tuple[Tensor, Tensor]
"""Of each tap the places that it reads, [4, wanted], and what these are multiplied with."""


class BicubicResize(nn.Module):
    """Resize [..., rows, columns] by a cubic kernel; corners of pixels stay where they are.

    Args:
        size: rows and columns of the result.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, channels, rows, columns] to [batch, channels, *size]."""
        if tuple(x.shape[-2:]) == self.size:
            return x
        return F.interpolate(x, self.size, mode="bicubic", align_corners=False)


@portable_form(BicubicResize)
class PortableBicubicResize(PortableOperator):
    """The same: the rows by four products and their sums, then the columns."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    @classmethod
    def of(cls, source: BicubicResize) -> PortableBicubicResize:
        """To the same size."""
        return cls(source.size)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, channels, rows, columns] to [batch, channels, *size]."""
        if self._is_portable(x):
            return self._forward_portable(x)
        return BicubicResize.forward(self, x)  # type: ignore[arg-type]

    @whole_numbers
    def _forward_portable(self, x: Tensor) -> Tensor:
        return resized(x, self.size)


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a tensor, or what computes like one, to rows and columns."""
    for axis, wanted in zip((-2, -1), size, strict=True):
        if x.shape[axis] != wanted:
            x = _along(x, axis, wanted)
    return x


def _along(x: Tensor, axis: int, wanted: int) -> Tensor:
    places, weights = _taps_on(x.shape[axis], wanted, x.device)
    shape = (-1, 1) if axis == -2 else (-1,)
    terms = [
        apart(x.index_select(axis, place) * weight.reshape(shape))
        for place, weight in zip(places, weights, strict=True)
    ]
    total: Tensor = (terms[0] + terms[1]) + (terms[2] + terms[3])
    return total


@functools.lru_cache(maxsize=64)
def _taps_on(given: int, wanted: int, device: torch.device) -> Taps:
    """Those of `cubic_taps`, copied to a device once: a forward waits for no copy."""
    # Not as tensors of inference, which a later step that learns could not keep.
    with torch.inference_mode(False):
        places, weights = cubic_taps(given, wanted)
        return places.to(device), weights.to(device)


def cubic_taps(given: int, wanted: int) -> Taps:
    """The four neighbours of each place; those beyond an end are the end's.

    Args:
        given: places that there are.
        wanted: places of the result.
    """
    centres = torch.arange(wanted, dtype=torch.float64, device="cpu") + 0.5
    place = centres * (given / wanted) - 0.5
    first = place.floor()
    offsets = torch.arange(-1, 3, device="cpu")[:, None]
    distances = (place - first - offsets).abs()
    near = ((_A + 2) * distances - (_A + 3)) * distances**2 + 1
    far = ((_A * distances - 5 * _A) * distances + 8 * _A) * distances - 4 * _A
    weights = torch.where(distances <= 1, near, far).float()
    return (first.long() + offsets).clamp(0, given - 1), weights
