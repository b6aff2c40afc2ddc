"""Units of one model in place of another's: what a unit's bits are worth, seen on the whole."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from torch import nn

from ptq4sam.model.insertion import TRANSFORMER, QuantizedSam, model_units
from ptq4sam.quantization.levels import FLOAT


@contextlib.contextmanager
def exchanged(sam: nn.Module, units: Mapping[str, nn.Module]) -> Iterator[None]:
    """Other modules stand at some paths of a model within the `with` block."""
    before = {name: sam.get_submodule(name) for name in units}
    try:
        _put(sam, units)
        yield
    finally:
        _put(sam, before)


def units_with_norms(source: QuantizedSam) -> dict[str, dict[str, nn.Module]]:
    """What of a model goes into another one for each of its units: the unit itself, and norms.

    Methods fold scales of a unit's channels into norms that are in no unit, or in another one.

    Args:
        source: the model that has both.

    Returns:
        By path of the unit, the modules by theirs, the unit first.
    """
    found: dict[str, dict[str, nn.Module]] = {name: {name: u} for name, u in model_units(source)}
    for path, owner in source.named_modules():
        for pair in source.description.normalized_at(path):
            layer, norm = f"{path}.{pair.layer}", f"{path}.{pair.norm}"
            for unit, modules in found.items():
                if layer.startswith(f"{unit}.") and not norm.startswith(f"{unit}."):
                    modules[norm] = owner.get_submodule(pair.norm)
    return found


def take_units(sam: QuantizedSam, levels: Mapping[str, int | str], source: QuantizedSam) -> None:
    """Give a frozen model units of another one for good; its scheme then says which.

    Args:
        sam: the model.
        levels: bits of these units in `source`, or "float", by path.
        source: the other model, which shares them from now on.
    """
    units = units_with_norms(source)
    for name in levels:
        _put(sam, units[name])
    # Of several that name a unit the last counts.
    others = {name: level for name, level in sam.scheme.units.items() if name not in levels}
    sam.scheme = sam.scheme.with_units({**others, **levels})
    left_float = {name for name, level in sam.scheme.units.items() if level == FLOAT}
    sam.folded = [name for name in sam.folded if f"{TRANSFORMER}.{name}" not in left_float]


def _put(sam: nn.Module, units: Mapping[str, nn.Module]) -> None:
    for name, unit in units.items():
        parent, _, last = name.rpartition(".")
        setattr(sam.get_submodule(parent), last, unit)
