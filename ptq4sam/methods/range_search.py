"""Ranges by what they do to the output of each product, and to masks (TinySAM, section 3.3).

Product after product in the order of execution, with all before it quantized: of its two operands
(the input and the weight of a layer; query and key, softmax and value of an attention) one has its
range chosen while the other keeps its own, in turns. Ranges are shares of the widest one. The error
is that of the product's output, each number of it squared and weighed by what it does to masks
(`task_gradients`), or squared alone. Where a weight has a scale for each output channel, or an
operand of an attention one for each head, each channel or head has its own choice. The paper says
as much; what it leaves open is in docs/tinysam.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ptq4sam.methods.method import METHODS, Calibration, Method
from ptq4sam.methods.task_gradients import squared_gradients
from ptq4sam.operators.arithmetic import learning
from ptq4sam.operators.base import (
    WEIGHT,
    Product,
    QuantizedLayer,
    QuantizedOperator,
    quantized_operators,
)
from ptq4sam.quantization.base import Mode, Quantizer
from ptq4sam.quantization.choices import Choices
from ptq4sam.quantization.modes import quantizer_mode
from ptq4sam.quantization.slots import HEADS
from ptq4sam.records import Record

HESSIAN, ERROR = "hessian", "error"


@dataclass(frozen=True)
class RangeSearch(Record):
    """Settings; defaults are TinySAM's where it says them.

    Attributes:
        metric: "hessian" weighs squared errors by squared gradients, "error" does not.
        lowest: share of the widest range that is tried first.
        highest: share that is tried last.
        steps: how many are tried.
        rounds: how often both operands have their turn.
        pictures: of those for calibration, the first so many.
        boxes: of each picture, the first so many.
        rows: of a linear layer's inputs on a picture, and of an attention's queries, about so many
            are looked at.
    """

    metric: Literal["hessian", "error"] = "hessian"
    lowest: float = 0.01
    highest: float = 1.2
    steps: int = 100
    rounds: int = 3
    pictures: int = 8
    boxes: int = 16
    rows: int = 512

    def _validate(self) -> None:
        self._require(0 < self.lowest <= self.highest, "lowest", "above 0, up to highest")
        for name in ("steps", "rounds", "pictures", "boxes", "rows"):
            self._require(getattr(self, name) >= 1, name, "1 or more")

    def shares(self) -> list[float]:
        """Of the widest range, all that are tried."""
        step = (self.highest - self.lowest) / max(1, self.steps - 1)
        return [self.lowest + step * place for place in range(self.steps)]


@dataclass(frozen=True)
class Searched:
    """A product with its operands' quantizers.

    Attributes:
        name: path in the model.
        operator: that makes it.
        product: of it.
        rows: of the first operand on a picture that are looked at.
    """

    name: str
    operator: QuantizedOperator
    product: Product
    rows: int

    @property
    def turns(self) -> tuple[str, str]:
        """Slots in the order of their turns: a weight goes before its input."""
        first, second = self.product.first, self.product.second
        return (second, first) if second == WEIGHT else (first, second)

    def some(self, x: Tensor) -> Tensor:
        """Of the first operand, or of what belongs to it in the output, what is looked at."""
        if self.operator.kind == "linear":
            x = x.flatten(0, -2)
            return x[:: -(-len(x) // self.rows)]
        return x[..., :: -(-x.shape[-2] // self.rows), :] if self._has_queries else x

    @property
    def _has_queries(self) -> bool:
        return self.operator.kind == "attention"

    def output(self, operands: Sequence[Tensor]) -> Tensor:
        """What the product is, with both quantizers as they are."""
        if self.product.second == WEIGHT:
            found: Tensor = self.operator(operands[0])
            return found
        slots = (self.product.first, self.product.second)
        given = [self.operator.quantizer(s)(x) for s, x in zip(slots, operands, strict=True)]
        return self.product.module(*given)  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def held(self, seen: Sequence[Seen], slot: str) -> Iterator[Sequence[Seen]]:
        """The same products with what a slot gives in its place, which is computed once."""
        quantizer = self.operator.quantizer(slot)
        if slot == WEIGHT:
            layer = cast(QuantizedLayer, self.operator)
            own, layer.weight.data = layer.weight.data, quantizer(layer.weight).detach()
            try:
                with quantizer_mode(quantizer, Mode.FLOAT):
                    yield seen
            finally:
                layer.weight.data = own
            return
        place = 0 if slot == self.product.first else 1

        def quantized(picture: Seen) -> Seen:
            operands = list(picture.operands)
            operands[place] = quantizer(operands[place])
            return replace(picture, operands=tuple(operands))

        held = [quantized(picture) for picture in seen]
        with quantizer_mode(quantizer, Mode.FLOAT):
            yield held

    def error(self, seen: Sequence[Seen], slot: str) -> Tensor:
        """Weighed squared errors of the output over all pictures, float64.

        Returns:
            One for each scale of a slot: [], [channels] or [heads].
        """
        each = has_channels(self.operator.quantizer(slot))
        total = torch.zeros((), dtype=torch.float64, device=seen[0].target.device)
        for picture in seen:
            errors = (self.output(picture.operands) - picture.target).square()
            errors = errors if picture.weights is None else errors * picture.weights
            if each:
                total = total + self._by_scale(errors, slot).flatten(1).double().sum(1)
            else:
                total = total + errors.sum(dtype=torch.float64)
        return total

    def _by_scale(self, output: Tensor, slot: str) -> Tensor:
        """An output with the axis first that a slot has scales along."""
        if slot == WEIGHT:
            return cast(QuantizedLayer, self.operator).by_output(output)
        return output.movedim(HEADS, 0)


@dataclass(frozen=True)
class Seen:
    """What a product saw on one picture.

    Attributes:
        operands: that are looked at; of a layer the input alone.
        ends: smallest and largest number of each, of all of it; [] or [heads].
        target: the output of these, without quantization.
        weights: of its squared errors, in its shape; None for 1.
    """

    operands: tuple[Tensor, ...]
    ends: tuple[tuple[Tensor, Tensor], ...]
    target: Tensor
    weights: Tensor | None


def choices_of(
    searched: Searched, slot: str, seen: Sequence[Seen], shares: Sequence[float]
) -> Choices | None:
    """What the quantizer of a slot can be; None where its grid has no ranges to choose."""
    quantizer = searched.operator.quantizer(slot)
    if slot == WEIGHT:
        rows = cast(QuantizedLayer, searched.operator).weight.flatten(1)
        low, high = torch.aminmax(rows, dim=1)
        if not has_channels(quantizer):
            low, high = low.amin(), high.amax()
    else:
        place = 0 if slot == searched.product.first else 1
        low = torch.stack([picture.ends[place][0] for picture in seen]).amin(0)
        high = torch.stack([picture.ends[place][1] for picture in seen]).amax(0)
    return quantizer.choices(low, high, shares)


def has_channels(quantizer: Quantizer) -> bool:
    """Whether it has a scale for each channel, or each head."""
    return quantizer.scale.dim() > 0


def _ends(x: Tensor, quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    """Smallest and largest number of an activation, of each head where heads have scales."""
    rows = x.movedim(HEADS, 0).flatten(1) if has_channels(quantizer) else x.reshape(1, -1)
    low, high = torch.aminmax(rows, dim=1)
    return (low, high) if has_channels(quantizer) else (low[0], high[0])


@METHODS.register("range-search")
class RangeSearchMethod(Method[RangeSearch]):
    """Of all products, with affine and hybrid grids; others keep what they have."""

    settings_type = RangeSearch

    def after_ranges(self, calibration: Calibration) -> Sequence[str]:
        """Choose the ranges of both operands of each product."""
        sam, settings = calibration.sam, self.settings
        pictures = [
            _Picture(sam, item.pixels, item.boxes[: settings.boxes])
            for item in calibration.items[: settings.pictures]
        ]
        changed = []
        with quantizer_mode(sam, Mode.FLOAT), learning(sam):
            products = {one.name: one for one in _in_order(sam, pictures[0], settings.rows)}
            weights: list[dict[str, Tensor]] = [{} for _ in pictures]
            if settings.metric == HESSIAN:
                weights = [p.squared_gradients(products, seed) for seed, p in enumerate(pictures)]
            for name, searched in products.items():
                seen = [
                    picture.seen(searched, found.pop(name, None))
                    for picture, found in zip(pictures, weights, strict=True)
                ]
                changed += list(self._choose(searched, seen))
        return changed

    def _choose(self, searched: Searched, seen: Sequence[Seen]) -> Iterator[str]:
        """Choose the ranges of one product and leave them on; yields slots that changed."""
        quantizers = {slot: searched.operator.quantizer(slot) for slot in searched.turns}
        for quantizer in quantizers.values():
            quantizer.mode = Mode.QUANTIZE
        shares = self.settings.shares()
        choices = {slot: choices_of(searched, slot, seen, shares) for slot in quantizers}
        best: dict[str, Tensor] = {}
        for _ in range(self.settings.rounds):
            before = dict(best)
            for slot, options in choices.items():
                if options is not None:
                    best[slot] = self._best(searched, seen, options, slot)
                    options.settle(best[slot])
            if best and all(s in before and torch.equal(best[s], before[s]) for s in best):
                break
        yield from (f"{searched.name}: {slot}" for slot, found in best.items() if found.any())

    def _best(
        self, searched: Searched, seen: Sequence[Seen], options: Choices, slot: str
    ) -> Tensor:
        """The first of the least error, for each scale of the slot."""
        errors = []
        (other,) = (name for name in searched.turns if name != slot)
        with searched.held(seen, other) as held:
            for index in range(options.count):
                options.use(index)
                errors.append(searched.error(held, slot))
        return torch.stack(errors).argmin(0)


class _ReachedError(Exception):
    """A forward pass came to where it was to end."""


class _Picture:
    """A calibration picture, passed through a model that is quantized bit by bit."""

    def __init__(self, sam: Any, pixels: Tensor, boxes: Tensor) -> None:
        self._sam, self._pixels, self._boxes = sam, pixels, boxes
        self._features: tuple[Tensor, ...] | None = None

    def forward(self) -> None:
        """Pass it through. What the encoder gave once is kept: it has all its ranges by then."""
        if self._features is None:
            self._features = self._sam.embed(self._pixels.to(self._sam.device))
        self._sam.decode(self._features, None, self._boxes.to(self._sam.device), None, True)

    def forget(self) -> None:
        """Begin with the picture again."""
        self._features = None

    def squared_gradients(self, products: dict[str, Searched], seed: int) -> dict[str, Tensor]:
        """By the outputs of products, of what is looked at."""

        def keep(name: str, x: Tensor) -> Tensor:
            return products[name].some(x).clone()

        modules = {name: one.product.module for name, one in products.items()}
        return squared_gradients(self._sam, self._pixels, self._boxes, modules, seed, keep)

    def seen(self, searched: Searched, weights: Tensor | None) -> Seen:
        """What a product sees, and what it gives without quantization."""
        (inputs,) = first_inputs(searched.product.module, self)
        slots = (searched.product.first, searched.product.second)
        count = 1 if slots[1] == WEIGHT else 2
        ends = tuple(
            _ends(x, searched.operator.quantizer(slot))
            for x, slot in zip(inputs[:count], slots, strict=False)
        )
        operands = (searched.some(inputs[0]).clone(), *(x.clone() for x in inputs[1:count]))
        return Seen(operands, ends, searched.output(operands), weights)


def first_inputs(module: nn.Module, picture: _Picture) -> list[tuple[Tensor, ...]]:
    """What comes to a module when a picture is passed through: of its first call."""
    found: list[tuple[Tensor, ...]] = []

    def reach(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs)
        raise _ReachedError

    handle = module.register_forward_pre_hook(reach)
    try:
        with contextlib.suppress(_ReachedError):
            picture.forward()
    finally:
        handle.remove()
    return found


def _in_order(sam: Any, picture: _Picture, rows: int) -> list[Searched]:
    """All products in the order in which a forward pass makes them."""
    every = {
        product.module: Searched(f"{name}.{product.name}".rstrip("."), operator, product, rows)
        for name, operator in quantized_operators(sam)
        for product in operator.products()
    }
    order: dict[nn.Module, None] = {}
    with contextlib.ExitStack() as hooks:
        for module in every:
            hook = module.register_forward_pre_hook(lambda m, _inputs: order.setdefault(m))
            hooks.callback(hook.remove)
        picture.forward()
    picture.forget()
    return [every[module] for module in order]
