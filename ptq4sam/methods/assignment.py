"""From a scheme to quantizers: the only place where that happens."""

from __future__ import annotations

from typing import cast

from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.quantizers import QUANTIZERS, Quantizer
from ptq4sam.quantization.registry import GRIDS
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.quantization.slots import SlotFormat
from ptq4sam.records import Record


def make_quantizer(scheme: Scheme, slot: str, roles: frozenset[str]) -> Quantizer:
    """A new quantizer for a slot, not calibrated.

    Args:
        scheme: of the unit that the slot belongs to.
        slot: "weight", "input", "query", "key", "value" or "softmax".
        roles: what the model's description says of the slot, as "decoder" or "after-gelu".
    """
    said = scheme.format_of(slot, roles)
    if isinstance(said, SlotFormat):
        grid = Grid(cast(int, said.bit))
        return GRIDS[said.grid].of_settings(grid, cast(Record, said.settings))
    channel_axis = None if said.ch_axis < 0 else said.ch_axis
    kind = QUANTIZERS[said.quantizer]
    quantizer = kind(Grid(said.bit, said.symmetric), said.observer, channel_axis)
    quantizer.group_size = said.group_size or None
    return quantizer
