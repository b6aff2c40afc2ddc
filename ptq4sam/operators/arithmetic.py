"""How an operator computes: a property of the model, which no caller changes by accident.

A quantized operator computes on whole numbers wherever its quantizers are on their grids, with or
without gradients: what it gives then is what a device gives. While something is learned it uses
torch's own operations, which have gradients; whoever learns says so (`learning`). The reference
makes the same forward with sums of int64 (`compute`).
"""

from __future__ import annotations

import contextlib
import enum
import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq4sam.quantization.whole import Windows

P = ParamSpec("P")


class Arithmetic(enum.Enum):
    """What products are made of."""

    WHOLE = "whole numbers"
    """Whole numbers in floating point, exact; portable functions between them."""
    INTEGER = "int64"
    """As WHOLE, but for products: these are summed in int64."""
    LEARNING = "learning"
    """torch's own operations on scaled values."""


class Operator(nn.Module):
    """What has a form for each `Arithmetic`."""

    arithmetic: Arithmetic = Arithmetic.WHOLE


def compute(module: nn.Module, arithmetic: Arithmetic) -> None:
    """Let operators below `module` compute so from now on."""
    for operator in module.modules():
        if isinstance(operator, Operator):
            operator.arithmetic = arithmetic


@contextlib.contextmanager
def learning(module: nn.Module) -> Iterator[None]:
    """Operators below `module` compute with gradients within the `with` block."""
    chosen = [operator for operator in module.modules() if isinstance(operator, Operator)]
    before = [operator.arithmetic for operator in chosen]
    try:
        compute(module, Arithmetic.LEARNING)
        yield
    finally:
        for operator, found in zip(chosen, before, strict=True):
            operator.arithmetic = found


def whole_numbers(forward: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Decorator of a forward that is made of whole numbers: no gradients, no lower precision.

    Its first argument behind `self` is a tensor.
    """

    @functools.wraps(forward)
    def run(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        x = args[1]
        assert isinstance(x, Tensor)
        with torch.no_grad():
            # torch knows no autocast for the meta device.
            if x.is_meta or not torch.is_autocast_enabled(x.device.type):
                return forward(*args, **kwargs)
            with torch.autocast(x.device.type, enabled=False):
                return forward(*args, **kwargs)

    return run


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """The product of a [..., n, K] and b [..., K, m], whole numbers, rounded to float32 once.

    Summed in int64, on a CPU: torch multiplies such nowhere else.
    """
    sums = a.to("cpu", torch.int64) @ b.to("cpu", torch.int64)
    return sums.to(torch.float32).to(a.device)


def integer_convolution(x: Tensor, weight: Tensor, windows: Windows) -> Tensor:
    """As `integer_product`, of whole numbers x [batch, channels, height, width] and a weight."""
    kernel = (weight.shape[2], weight.shape[3])
    places = (windows.dilation, windows.padding, windows.stride)
    # torch moves only floats so, which hold what is moved.
    looked_at = F.unfold(x.double(), kernel, *places)
    groups, batch = windows.groups, len(x)
    by_group = looked_at.reshape(batch, groups, -1, looked_at.shape[-1]).transpose(-1, -2)
    by_output = weight.reshape(groups, len(weight) // groups, -1).transpose(-1, -2)
    sums = integer_product(by_group, by_output).transpose(-1, -2)
    return sums.reshape(batch, len(weight), *windows.size(kernel, x.shape[2], x.shape[3]))
