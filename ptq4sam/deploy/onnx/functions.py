"""Torch's functions on traced tensors: those of structure, and the arithmetic between modules.

Functions of structure are told by torch itself what they do: they run on tensors without numbers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ptq4sam.deploy.onnx.moves import UNKNOWN, Cut, Pad, Permute, Reshape
from ptq4sam.deploy.onnx.traced import FUNCTIONS, Traced, first_traced, refused


def lowers(*names: str) -> Callable[[Any], Any]:
    """Register what writes the nodes of functions."""

    def register(lowering: Any) -> Any:
        FUNCTIONS.update(dict.fromkeys(names, lowering))
        return lowering

    return register


def _numberless(x: Any) -> Tensor:
    return torch.empty(x.shape, device="meta")


def _same(x: Traced, *_arguments: Any, **_options: Any) -> Traced:
    return x


for _name in ("contiguous", "clone", "detach", "float"):
    FUNCTIONS[_name] = _same


def _shaped(name: str, x: Traced, *arguments: Any, **options: Any) -> Traced:
    made = getattr(_numberless(x), name)(*arguments, **options)
    if made.dtype != x.dtype:
        raise refused(x, f"reads numbers as {made.dtype}")
    return x.moved(Reshape(tuple(made.shape)))


for _name in ("reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze"):
    FUNCTIONS[_name] = functools.partial(_shaped, _name)


def _permuted(name: str, x: Traced, *arguments: Any, **options: Any) -> Traced:
    # Sides that differ tell which went where.
    sides = torch.empty([2 + axis for axis in range(x.ndim)], device="meta")
    order = getattr(sides, name)(*arguments, **options).shape
    return x.moved(Permute(tuple(side - 2 for side in order)))


for _name in ("permute", "transpose", "movedim", "swapaxes"):
    FUNCTIONS[_name] = functools.partial(_permuted, _name)


def _parts(name: str, x: Traced, *arguments: Any, **options: Any) -> Any:
    """Pieces side by side, of which an axis may be gone."""
    whole = _numberless(x)
    made = getattr(whole, name)(*arguments, **options)
    parts = [made] if isinstance(made, Tensor) else made
    found = []
    for part in parts:
        left, starts = part.storage_offset(), []
        for stride in whole.stride():
            starts.append(left // stride if stride else 0)
            left -= starts[-1] * stride
        sizes = list(part.shape)
        if len(sizes) < x.ndim:
            gone = _gone(name, x, arguments, options)
            sizes.insert(gone, 1)
        cuts = [
            Cut(axis, start, start + size)
            for axis, (start, size) in enumerate(zip(starts, sizes, strict=True))
            if size != x.shape[axis]
        ]
        found.append(x.moved(*cuts, Reshape(tuple(part.shape))))
    return found[0] if isinstance(made, Tensor) else tuple(found)


def _gone(name: str, x: Traced, arguments: Any, options: Any) -> int:
    """The axis that a function takes away."""
    sides = [1000 + axis for axis in range(x.ndim)]
    made = getattr(torch.empty(sides, device="meta"), name)(*arguments, **options)
    left = made.shape if isinstance(made, Tensor) else made[0].shape
    return next(axis for axis, side in enumerate(sides) if side not in left)


for _name in ("unbind", "select", "narrow", "chunk", "split", "tensor_split"):
    FUNCTIONS[_name] = functools.partial(_parts, _name)


@lowers("getitem")
def _item(x: Traced, index: Any) -> Traced:
    """Slices, whole numbers, None and an ellipsis."""
    given = list(index) if isinstance(index, tuple) else [index]
    if not all(item is None or item is ... or isinstance(item, slice | int) for item in given):
        raise refused(x, "picks elements by a tensor")
    taken = sum(item is not None and item is not ... for item in given)
    place = given.index(...) if ... in given else len(given)
    given[place : place + 1] = [slice(None)] * (x.ndim - taken)
    cuts, shape, axis = [], [], 0
    for item in given:
        if item is None:
            shape.append(1)
            continue
        side = x.shape[axis]
        if isinstance(item, int):
            cuts.append(Cut(axis, item % side, item % side + 1))
        else:
            first, last, step = item.indices(side)
            shape.append(len(range(first, last, step)))
            if (first, last, step) != (0, side, 1):
                cuts.append(Cut(axis, first, last, step))
        axis += 1
    return x.moved(*cuts, Reshape(tuple(shape)))


@lowers("index_select")
def _picked(x: Traced, dim: int, index: Tensor) -> Traced:
    places = x.graph.integers(*index.tolist())
    shape = [len(index) if axis == dim % x.ndim else side for axis, side in enumerate(x.shape)]
    return x.node("Gather", places, shape=shape, axis=dim)


@lowers("interpolate")
def _interpolated(
    x: Traced, size: Any = None, scale_factor: Any = None, mode: str = "nearest", **options: Any
) -> Traced:
    """By a cubic kernel to given sides, or whole multiples of the sides by the nearest element."""
    numberless = _numberless(x)
    shape = F.interpolate(numberless, size, scale_factor, mode, **options).shape
    if mode == "bicubic" and not (options.get("align_corners") or scale_factor):
        how: dict[str, Any] = {
            "mode": "cubic",
            "cubic_coeff_a": -0.75,
            "coordinate_transformation_mode": "half_pixel",
        }
        sides = x.graph.integers(*shape)
        return x.node("Resize", "", "", sides, shape=tuple(shape), exact=False, **how)
    if mode != "nearest" or any(
        after % before for before, after in zip(x.shape, shape, strict=True)
    ):
        raise refused(x, "resizes otherwise than by repeating, or by a cubic kernel")
    factors = [after // before for before, after in zip(x.shape, shape, strict=True)]
    scales = x.graph.constant(f"{x.graph.path}.scales", np.array(factors, np.float32))
    how = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return x.node("Resize", "", scales, shape=tuple(shape), mode="nearest", **how)


@lowers("pad")
def _pad(
    x: Traced, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> Traced:
    if mode != "constant" or value:
        raise refused(x, "pads otherwise than by zeros")
    before, behind = [0] * x.ndim, [0] * x.ndim
    for place in range(len(pad) // 2):
        before[-1 - place], behind[-1 - place] = pad[2 * place], pad[2 * place + 1]
    return x.moved(Pad(tuple(before), tuple(behind)))


@lowers("dropout")
def _dropout(x: Traced, p: float = 0.5, training: bool = True, inplace: bool = False) -> Traced:
    if training:
        raise refused(x, "drops elements at random")
    return x


@lowers("cat", "concat")
def _concatenated(tensors: Sequence[Traced | Tensor], dim: int = 0) -> Traced:
    x = first_traced(tensors)
    shape = torch.cat([_numberless(part) for part in tensors], dim).shape
    names = [_name_of(x, part) for part in tensors]
    found = x.graph.node("Concat", names, f"{x.graph.path}.concat", axis=dim)
    return x.new(found, shape, all(getattr(part, "exact", True) for part in tensors))


@lowers("stack")
def _stacked(tensors: Sequence[Traced | Tensor], dim: int = 0) -> Any:
    return _concatenated([part.unsqueeze(dim) for part in tensors], dim)


@lowers("expand")
def _expanded(x: Traced, *sizes: Any) -> Traced:
    shape = _numberless(x).expand(*sizes).shape
    if max(shape) >= UNKNOWN:
        raise refused(x, "spreads to a size that is not known before it runs")
    return x.node("Expand", x.graph.integers(*shape), shape=shape)


def _name_of(x: Traced, other: Traced | Tensor | float) -> str:
    """The name of a tensor; a constant that spreads to an unknown size does so as x has it."""
    if isinstance(other, Traced):
        return other.name
    if not isinstance(other, Tensor):
        return x.graph.number(float(other))
    path = f"{x.graph.path}.operand"
    unknown = [axis for axis, side in enumerate(other.shape) if side >= UNKNOWN]
    for axis in unknown:
        other = other.narrow(axis, 0, 1)
    name = x.graph.tensor(other, path)
    if not unknown:
        return name
    shape = x.graph.node("Shape", [x.name], f"{path}.shape")
    sides = [
        x.graph.slice(shape, axis, axis + 1, 0, f"{path}.side")
        if axis in unknown
        else x.graph.integers(1)
        for axis in range(other.ndim)
    ]
    each = x.graph.node("Concat", sides, f"{path}.each", axis=0)
    return x.graph.node("Expand", [name, each], f"{path}.spread")


def _binary(kind: str, *arguments: Any, alpha: float = 1) -> Traced:
    x = first_traced(arguments)
    if alpha != 1:
        raise refused(x, "adds multiples")
    names = [_name_of(x, argument) for argument in arguments]
    spread: Any = torch.broadcast_shapes
    shape = spread(*(getattr(argument, "shape", ()) for argument in arguments))
    exact = all(getattr(argument, "exact", True) for argument in arguments)
    return x.new(x.graph.node(kind, names, f"{x.graph.path}.{kind.lower()}"), shape, exact)


for _kind, _names in (("Add", ("add", "radd", "iadd")), ("Sub", ("sub", "isub"))):
    FUNCTIONS.update(dict.fromkeys(_names, functools.partial(_binary, _kind)))


@lowers("rsub")
def _less_from(x: Traced, other: Any) -> Traced:
    return _binary("Sub", other, x)


@lowers("mul", "imul", "rmul", "multiply")
def _product(first: Any, second: Any) -> Traced:
    """Exact by a power of 2 alone: a runtime may round a product and a sum behind it once."""
    other = second if isinstance(first, Traced) else first
    found = _binary("Mul", first, second)
    found.exact &= isinstance(other, float | int) and math.frexp(other)[0] in (0.5, -0.5)
    return found


@lowers("div", "truediv")
def _quotient(first: Any, second: Any) -> Traced:
    if isinstance(second, float | int) and abs(math.frexp(second)[0]) == 0.5:
        second = 1 / second
        return _binary("Mul", first, second)
    found = _binary("Div", first, second)
    found.exact = False
    return found


@lowers("matmul", "bmm")
def _matmul(first: Any, second: Any) -> Traced:
    x = first_traced((first, second))
    shape = torch.matmul(_numberless(first), _numberless(second)).shape
    names = [_name_of(x, factor) for factor in (first, second)]
    return x.new(x.graph.node("MatMul", names, f"{x.graph.path}.matmul"), shape, exact=False)


def _elementwise(kind: str, exact: bool, x: Traced, inplace: bool = False) -> Traced:
    return x.node(kind, exact=exact)


for _name, _kind, _exact in (
    ("abs", "Abs", True),
    ("neg", "Neg", True),
    ("round", "Round", True),
    ("sqrt", "Sqrt", True),
    ("relu", "Relu", True),
    ("sigmoid", "Sigmoid", False),
    ("hardswish", "HardSwish", False),
):
    FUNCTIONS[_name] = functools.partial(_elementwise, _kind, _exact)


@lowers("reciprocal")
def _reciprocal(x: Traced) -> Traced:
    """Not by Reciprocal: runtimes have faster nodes for it, which are not always rounded right."""
    return _binary("Div", 1.0, x)


@lowers("clamp")
def _clamped(x: Traced, min: Any = None, max: Any = None) -> Traced:
    """Between numbers, or tensors of them.

    Not by Clip, past which OpenVINO's low-precision passes move a factor before it.
    """
    for kind, bound in (("Max", min), ("Min", max)):
        x = x if bound is None else x.node(kind, _name_of(x, bound))
    return x


@lowers("silu")
def _silu(x: Traced, inplace: bool = False) -> Traced:
    return _binary("Mul", x, _elementwise("Sigmoid", False, x))


@lowers("gelu")
def _gelu(x: Traced, approximate: str = "none") -> Traced:
    return x.node("Gelu", exact=False, approximate=approximate)


@lowers("softmax")
def _softmax(x: Traced, dim: int, **_options: Any) -> Traced:
    return x.node("Softmax", exact=False, axis=dim)


def _reduced(kind: str, x: Traced, dim: Any = None, keepdim: bool = False) -> Traced:
    axes = range(x.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {axis % x.ndim for axis in axes}
    sides = ((1 if axis in gone else side, axis) for axis, side in enumerate(x.shape))
    shape = [side for side, axis in sides if keepdim or axis not in gone]
    given, kept = x.graph.integers(*axes), int(keepdim)
    return x.node(kind, given, shape=shape, exact=kind == "ReduceMax", keepdims=kept)


for _name, _kind in (("amax", "ReduceMax"), ("sum", "ReduceSum"), ("mean", "ReduceMean")):
    FUNCTIONS[_name] = functools.partial(_reduced, _kind)
