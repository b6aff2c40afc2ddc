"""Simulation against integer reference, one operator at a time on the simulation's inputs.

A whole network amplifies a code that was rounded the other way until two correct computations
differ as much as quantization itself makes them, so that tensors at its end prove nothing. Here
every quantized operator of the simulation is computed again in integers, from what the simulation
gave it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.operators.base import QuantizedOperator, quantized_operators

EQUAL_SHARE = 0.999
"""Of an operator's output codes, at least so many equal those of the simulation."""
LARGEST_DIFFERENCE = 1.0
"""Most that an output differs, in steps of its grid."""

# Logits of few bits are multiples of one number: on a grid that fits them many would lie exactly
# between two codes.
_UNEVEN = 0.618


@dataclass
class OperatorCheck:
    """What one operator gave over all calls.

    Attributes:
        name: path in the model.
        outputs: output values compared.
        equal: those whose code is the simulation's.
        largest: largest difference in steps of the output grid, which has as many codes as the
            inputs, over the range of the output in the call.
        exact: whether all outputs are the same bits.
    """

    name: str
    outputs: int = 0
    equal: int = 0
    largest: float = 0.0
    exact: bool = True

    @property
    def share(self) -> float:
        """Share of equal codes."""
        return self.equal / max(1, self.outputs)

    @property
    def kept(self) -> bool:
        """Whether the promises are kept.

        Of few outputs a single one may differ, which is more than one in a thousand.
        """
        few = self.outputs - self.equal <= 1
        near = self.largest <= LARGEST_DIFFERENCE
        return self.outputs > 0 and self.exact and near and (few or self.share >= EQUAL_SHARE)

    def add(self, ours: Tensor, simulated: Tensor, levels: int) -> None:
        """Compare an output, on a grid of `levels` codes over its range."""
        low, high = torch.aminmax(simulated)
        step = ((high - low) / (levels - _UNEVEN)).clamp(min=torch.finfo(torch.float32).tiny)
        equal = torch.round((ours - low) / step) == torch.round((simulated - low) / step)
        self.outputs += equal.numel()
        self.equal += int(equal.sum())
        self.largest = max(self.largest, float(((ours - simulated).abs() / step).max()))
        self.exact &= torch.equal(ours, simulated)


@torch.no_grad()
def verify_operators(
    sam: QuantizedSam, integer: QuantizedSam, run: Callable[[], object]
) -> list[OperatorCheck]:
    """Compare every quantized operator on what it sees in a forward pass of the simulation.

    Args:
        sam: the frozen model.
        integer: its integer form (see `integer_model`).
        run: passes pictures and prompts through `sam`.

    Returns:
        A check for each quantized operator, in order of the modules. One without outputs was not
        reached.
    """
    checks: list[OperatorCheck] = []
    with _watching(sam, integer, checks):
        run()
    return checks


def worst_first(checks: Sequence[OperatorCheck]) -> list[OperatorCheck]:
    """Broken promises first, then by share of equal codes."""
    return sorted(checks, key=lambda check: (check.kept, check.exact, check.share))


@contextlib.contextmanager
def _watching(
    sam: QuantizedSam, integer: QuantizedSam, checks: list[OperatorCheck]
) -> Iterator[None]:
    counterparts = dict(quantized_operators(integer))
    handles = []
    for name, operator in quantized_operators(sam):
        checks.append(OperatorCheck(name))
        hook = _hook(checks[-1], counterparts[name])
        handles.append(operator.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(check: OperatorCheck, counterpart: QuantizedOperator) -> Callable[..., None]:
    levels = min(quantizer.grid.levels for quantizer in counterpart.slots().values())

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        check.add(counterpart(*inputs), output, levels)

    return hook
