"""A forward pass under watch: are the operands of every product on the grids of its quantizers?"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ptq4sam.model.audit.modules import DECODER, may_multiply_floats
from ptq4sam.model.audit.operands import are_digits, is_on_grid, sample
from ptq4sam.model.audit.ranges import Reach
from ptq4sam.model.audit.report import Finding
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.operators.base import (
    QUERY,
    WEIGHT,
    QuantizedOperator,
    activation_slots,
    quantized_operators,
)
from ptq4sam.operators.watching import ProductWatch
from ptq4sam.quantization.int8_products import int8_shift
from ptq4sam.quantization.modes import quantizers
from ptq4sam.quantization.quantizers import Quantizer
from ptq4sam.quantization.scheme import STUDY

_SAMPLE, _FEWEST = 2**16, 2**10


@dataclass
class Operand:
    """One side of the products that a layer or an attention makes.

    Attributes:
        role: "input", "weight", "query", "key", "softmax" or "value".
        quantizer: whose grid it must be on.
        factor: what values were multiplied with before.
        of_channels: whether it has a grid for each output channel.
        elements: how many were compared.
        off: how many of them are on no point.
    """

    role: str
    quantizer: Quantizer
    factor: float = 1.0
    of_channels: bool = False
    elements: int = 0
    off: int = 0

    def saw(self, x: Tensor, channel_axis: int, most: int) -> None:
        """Compare a sample of so many numbers with the grid."""
        axis = channel_axis if self.of_channels else None
        compared = sample(x, most, axis)
        if x.dtype == torch.int8 and self.role != WEIGHT:
            # Whole numbers that int8 does not hold are shifted until it does.
            compared = compared.int() + (int8_shift(*self.quantizer.step_bounds) or 0)
        on_grid = is_on_grid(compared, self.quantizer, axis, self.factor)
        self.elements += compared.numel()
        self.off += int((~on_grid).sum())


@dataclass
class Product:
    """What is multiplied where, and how often it was seen."""

    where: str
    first: Operand
    second: Operand
    seen: int = 0

    def saw(self, first: Tensor, second: Tensor, is_convolution: bool) -> None:
        """Compare both operands."""
        self.seen += 1
        most = _sample_size(self.seen)
        self.first.saw(first, -1, most)
        self.second.saw(second, 0 if is_convolution else -1, most)

    def findings(self, known: Collection[str]) -> Iterator[Finding]:
        """Operands off their grids; or that there was no product.

        Args:
            known: layers whose weights were found to be off their grids.
        """
        if not self.seen:
            roles = f"{self.first.role} and {self.second.role}"
            yield Finding(self.where, f"made no product of its {roles}, expected one")
        for operand in (self.first, self.second):
            if operand.off and not (operand.role == "weight" and self.where in known):
                share = operand.off / operand.elements
                yield Finding(
                    self.where,
                    f"{share:.1%} of the {operand.role} values that it multiplied are off the "
                    f"grid, expected points of its {operand.role}_quantizer",
                )


class WatchedPass:
    """Products and quantizers of a model during a forward pass.

    Args:
        sam: the model.

    Attributes:
        reaches: of each activation quantizer by its path, what came to it.
    """

    def __init__(self, sam: QuantizedSam) -> None:
        self._sam = sam
        self._names = {module: name for name, module in sam.named_modules()}
        self._running: list[nn.Module] = []
        self._products = dict(_expected_products(sam))
        self._attentions: dict[nn.Module, QuantizedOperator] = {
            operator: operator
            for _, operator in quantized_operators(sam)
            if QUERY in operator.slot_names
        }
        self._positions: Counter[str] = Counter()
        self._no_positions: Counter[str] = Counter()
        self._floats: Counter[str] = Counter()
        self._decoded = 0
        self.reaches = {name: Reach(q) for name, q in activation_slots(sam)}

    def run(self, forward: Callable[[], Any]) -> Any:
        """Make the pass; returns what it gives."""
        watch = ProductWatch(self._saw)
        with self._hooks(watch), watch:
            return forward()

    def findings(self, known: Collection[str]) -> Iterator[Finding]:
        """What was wrong.

        Args:
            known: where something was found before; what lies within is not told again.
        """
        for product in self._products.values():
            yield from product.findings(known)
        for name, count in self._no_positions.items():
            if count:
                problem = f"made {count} products that are not of its query and positions"
                yield Finding(name, f"{problem}, expected none")
        for name, count in self._floats.items():
            allowed = self._decoded if name == DECODER else 0
            told = any(name == where or name.startswith(f"{where}.") for where in known)
            if not told and count != allowed and not may_multiply_floats(name, self._sam):
                problem = f"made {count} products of float numbers, expected {allowed}"
                yield Finding(name or "model", problem)
        # The study holds sums that differ a thousandfold between pictures, by a moving average.
        in_reach = self._sam.scheme.compat != STUDY
        for name, reach in self.reaches.items():
            yield from (Finding(name, problem) for problem in reach.problems(in_reach))

    def _saw(self, first: Tensor, second: Tensor, is_convolution: bool) -> None:
        owner = self._running[-1] if self._running else self._sam
        product = self._products.get(owner)
        name = self._names[owner]
        if product is not None:
            product.saw(first, second, is_convolution)
        elif owner in self._attentions:
            self._positions[name] += 1
            most = _sample_size(self._positions[name])
            fits = _of_positions(self._attentions[owner], first, second, most)
            self._no_positions[name] += not fits
        else:
            self._floats[name] += 1

    @contextlib.contextmanager
    def _hooks(self, watch: ProductWatch) -> Iterator[None]:
        """Know the module that runs; stop watching in quantizers, which are kernels."""
        by_quantizer = {reach.quantizer: reach for reach in self.reaches.values()}
        kernels = {quantizer for _, quantizer in quantizers(self._sam)}

        def enter(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._running.append(module)
            self._decoded += module is self._sam.mask_decoder
            if module in kernels:
                watch.__exit__(None, None, None)
                if reach := by_quantizer.get(module):
                    reach.saw(inputs[0])

        def leave(module: nn.Module, *_: object) -> None:
            self._running.pop()
            if module in kernels:
                watch.__enter__()

        handles = []
        for module in self._names:
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _expected_products(sam: QuantizedSam) -> Iterator[tuple[nn.Module, Product]]:
    """The products that quantized operators make, by the module that makes each."""
    for name, operator in quantized_operators(sam):
        for product in operator.products():
            first, second = (
                Operand(slot, operator.quantizer(slot), factor, of_channels=slot == WEIGHT)
                for slot, factor in ((product.first, product.factor), (product.second, 1.0))
            )
            yield product.module, Product(name, first, second)


def _sample_size(seen: int) -> int:
    """How many numbers of an operand are compared when a product is seen for the n-th time.

    Global attentions are computed in hundreds of pieces.
    """
    return max(_FEWEST, _SAMPLE // seen)


def _of_positions(operator: QuantizedOperator, first: Tensor, second: Tensor, most: int) -> bool:
    """Whether one operand is on the query's grid, and the other a table of relative positions."""
    # Tables are whole numbers where all of the attention is.
    whole = all(quantizer.is_whole for quantizer in operator.slots().values())

    def fits(query: Tensor, table: Tensor) -> bool:
        return (not whole or are_digits(sample(table, most))) and bool(
            is_on_grid(sample(query, most), operator.quantizer(QUERY)).all()
        )

    return fits(first, second) or fits(second, first)
