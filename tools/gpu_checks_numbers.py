"""Checks of `gpu_check.py`: are the numbers of a GPU those of a CPU, bit for bit?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ptq4sam.methods.granularity_points import point_parameters, to_points
from ptq4sam.operators.activation import PortableGELU
from ptq4sam.operators.attention import portable_softmax
from ptq4sam.operators.norm import PortableLayerNorm
from ptq4sam.quantization.grid import Grid, fake_quantize, steps_from_zero
from ptq4sam.quantization.whole import (
    WholeConvolution,
    WholeLinear,
    Windows,
    rescaled,
    whole_product,
)

Found = Iterator[tuple[Any, ...]]
_LARGE, _SMALL = 2**22, 2**14
_GRID = Grid(4)


def bits(device: str, small: bool) -> Found:
    """Everything that promises bits."""
    yield from _single_operations(device, small)
    yield from sums(device, small)
    yield from kernels(device, small)


def awkward(count: int, seed: int = 0) -> Tensor:
    """Numbers of all sizes, and quotients that are exact or lie next to a half."""
    generator = torch.Generator("cpu").manual_seed(seed)
    normal = torch.randn(count // 2, generator=generator, device="cpu")
    scaled = normal * torch.exp2(torch.randint(-20, 20, (count // 2,), generator=generator).float())
    steps = torch.randint(-600, 600, (count - count // 2,), generator=generator).float() / 2
    return torch.cat([scaled, steps * 0.9375])[torch.randperm(count, generator=generator)]


def unequal(name: str, ours: Tensor, theirs: Tensor, *inputs: Tensor) -> tuple[Any, ...]:
    """A finding: how many numbers differ, and the first that does."""
    ours, theirs = ours.detach().cpu(), theirs.detach().cpu()
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    count = int((~same).sum())
    if count == 0:
        return name, f"all of {same.numel()} equal", "", True
    place = int((~same).flatten().nonzero()[0])
    given = [f"{float(x.flatten()[place]):.9g}" for x in inputs if x.numel() == same.numel()]
    values = f"{float(ours.flatten()[place]):.9g} for {float(theirs.flatten()[place]):.9g}"
    return name, f"{count} of {same.numel()} differ, first {values} at {given}", "", False


def _single_operations(device: str, small: bool) -> Found:
    """Torch's own operations one by one, against the CPU's."""
    x, y = (awkward(_SMALL if small else _LARGE, seed) for seed in (0, 1))
    y = torch.where(y == 0, 1.0, y)
    operations: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "x / y": torch.div,
        "1 / y": lambda _, b: b.reciprocal(),
        "x * y": torch.mul,
        "x + y": torch.add,
        "round(x / y)": lambda a, b: (a / b).round(),
        "sqrt(|x|) in float64": lambda a, _: a.double().abs().sqrt().float(),
    }
    for name, operation in operations.items():
        yield unequal(name, operation(x.to(device), y.to(device)), operation(x, y), x, y)


def sums(device: str, small: bool) -> Found:
    """Whole sums at their bounds, whatever the precision that products are allowed."""
    yield "products are allowed", torch.get_float32_matmul_precision()
    rows, inner, columns = (64, 128, 64) if small else (1024, 768, 1024)
    generator = torch.Generator("cpu").manual_seed(0)

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator).float()

    for name, bound in (("8-bit codes", 255), ("16-bit codes", 65535)):
        x, weight = whole(-bound, bound, rows, inner), whole(-128, 127, columns, inner)
        exact = (x.double() @ weight.double().t()).float()
        found = WholeLinear(weight.to(device), -bound, bound)(x.to(device))
        yield unequal(f"whole linear, {name}", found, exact)
    points = whole(0, 2**15, 2, 64, 48)
    value = whole(-127, 127, 2, 48, 64)
    exact = (points.double() @ value.double()).float()
    largest = float((points.abs() @ value.abs()).max())
    found = whole_product(points.to(device), value.to(device), largest)
    yield unequal("whole product, 15-bit points", found, exact)
    image, kernel = whole(-255, 255, 1, 32, 16, 16), whole(-128, 127, 16, 32, 3, 3)
    exact = F.conv2d(image.double(), kernel.double(), padding=1).float()
    layer = WholeConvolution(kernel.to(device), -255, 255, Windows(padding=(1, 1)))
    found = layer(image.to(device))
    yield unequal("whole convolution", found, exact)


@torch.no_grad()
def kernels(device: str, small: bool) -> Found:
    """Compiled functions against the same operations one by one, on the device and on the CPU.

    In small nothing is compiled, for small tensors never are.
    """
    x = awkward(_SMALL if small else _LARGE)
    for name, function in _functions().items():
        ours = function(x.to(device))
        yield unequal(f"{name}, against the CPU", ours, function(x), x)
        # Pieces are too small for kernels.
        pieces = [function(part.to(device)) for part in torch.split(x, _SMALL)]
        yield unequal(f"{name}, against one by one", ours, torch.cat(pieces), x)
    codes = torch.arange(-8, 8, device="cpu").float().repeat(len(x) // 16)
    for step in (0.1, 0.9375, 1 / 3, 0.0123456789):
        scale, zero = (torch.tensor(value, device=device) for value in (step, 8.0))
        exact = codes * torch.tensor(step, device="cpu")
        found = steps_from_zero(exact.to(device), scale, zero, _GRID)
        yield unequal(f"codes of k * {step:.4g}", found, codes, exact)
    rows, weight, bias = awkward(len(x)).reshape(-1, 256), awkward(256, 2), awkward(256, 3)
    found = rescaled(rows.to(device), weight.to(device), bias.to(device))
    yield unequal("product, then bias", found, rows * weight + bias)


def _functions() -> dict[str, Callable[[Tensor], Tensor]]:
    """Functions of one flat tensor, on any device, whose values promise bits."""

    def number(x: Tensor, value: float) -> Tensor:
        return torch.tensor(value, device=x.device)

    def norm(x: Tensor) -> Tensor:
        layer = PortableLayerNorm(torch.nn.LayerNorm(64, device=x.device))
        normalized: Tensor = layer(x.clamp(-100, 100).reshape(-1, 64))
        return normalized.flatten()

    def points(x: Tensor) -> Tensor:
        chosen = point_parameters(number(x, 0.9), number(x, 4.0), 16)
        return to_points(x.abs().clamp(1e-20, 1), *chosen)

    return {
        "codes": lambda x: steps_from_zero(x, number(x, 0.9375), number(x, 7.0), _GRID),
        "fake quantization": lambda x: fake_quantize(x, number(x, 0.3), number(x, 7.0), _GRID),
        "GELU": lambda x: PortableGELU()(x.clamp(-20, 20)),
        "softmax": lambda x: portable_softmax(x.clamp(-30, 30).reshape(-1, 64)).flatten(),
        "layer norm": norm,
        "points of adaptive granularity": points,
    }
