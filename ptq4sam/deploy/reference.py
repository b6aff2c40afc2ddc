"""The integer reference: a quantized SAM whose products are summed in integers."""

from __future__ import annotations

import copy

from ptq4sam.deploy.codes import layer_codes
from ptq4sam.errors import DeployError
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.operators.arithmetic import Arithmetic, compute
from ptq4sam.operators.base import quantized_layers, quantized_operators

MOST_BITS = 8
"""Bits of the widest codes."""
MOST_STEPS = 255
"""Steps from zero to the farthest point, which a byte holds: of grids that are not even too."""
LONGEST_SUM = 8191
"""Terms of the longest sum that 32 bits hold: at 8 bits a product of codes is corrected for two
zero points, so that a sum of K is made of four terms below K * 2^16 each. SAM's longest sums have
5120 (second MLP layer of ViT-H) and 4096 terms (keys of a global attention at 1024 px)."""


def integer_model(sam: QuantizedSam) -> QuantizedSam:
    """A copy of a frozen quantized SAM that sums in int64; all else is the same forward.

    It is a reference: exact, not fast.

    Raises:
        DeployError: codes or sums are wider than devices have them, or a weight is not on its grid;
            the message names it.
        CalibrationError: the model was not calibrated.
    """
    layers = dict(quantized_layers(sam))
    for name, operator in quantized_operators(sam):
        slots = operator.slots().items()
        grids = [q.grid for slot, q in slots if slot not in operator.wide_slots]
        terms = layers[name].weight[0].numel() if name in layers else 0
        _require_narrow(name, max(grid.bits for grid in grids), terms)
        _require_near(name, max(grid.largest_step for grid in grids))
    for layer in layers.values():
        layer_codes(layer)
    copied = copy.deepcopy(sam)
    compute(copied, Arithmetic.INTEGER)
    return copied


def _require_narrow(name: str, bits: int, terms: int) -> None:
    if bits > MOST_BITS or terms > LONGEST_SUM:
        raise DeployError(
            f"{name} has codes of {bits} bits and sums of {terms} products: integer arithmetic in "
            f"32 bits holds {MOST_BITS} bits and {LONGEST_SUM} products"
        )


def _require_near(name: str, steps: int) -> None:
    if steps > MOST_STEPS:
        raise DeployError(
            f"{name} has points up to {steps} steps away from zero, a byte holds {MOST_STEPS}: "
            "quantize it to fewer bits"
        )
