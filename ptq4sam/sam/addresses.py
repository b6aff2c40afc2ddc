"""Layers by an address, `model:stage:block:layer`, in the place of a path.

A family's description says which operators have which address (`Addressed`); several may share one.
An address of a selection has in each place what there is, a list of these with commas, `all` or
`none`; instead of numbers of layers also their kinds, as `any:stage3,stage4:all:depthwise`. The
model is `any`, its name, or the last word of that. A list without anything names nothing, and the
log says so.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ptq4sam.records import FieldError

_log = logging.getLogger(__name__)

_PARTS = ("stage", "block", "layer")
_ALL, _NONE, _ANY, _BUT = "all", "none", "any", "all_but_"


class Address(NamedTuple):
    """Where a layer is.

    Attributes:
        stage: its name.
        block: number in the stage.
        layer: number in the block.
        kind: what it is.
    """

    stage: str
    block: int
    layer: int
    kind: str

    def __str__(self) -> str:
        return f"{self.stage}:{self.block}:{self.layer}"


@dataclass(frozen=True)
class Addressed:
    """Operators that have addresses.

    Attributes:
        pattern: of their paths; its groups `stage` and `block` are numbers, where it has them.
        kind: what they are.
        stage: name, in which {} stands for the group's number.
        layer: number in the block.
        block: of the first one; that of the group is added.
    """

    pattern: str
    kind: str
    stage: str = "stage{}"
    layer: int = 0
    block: int = 0


def is_address(text: str) -> bool:
    """Whether something is an address, not a path."""
    return text.count(":") == len(_PARTS)


def label(model: str) -> str:
    """The model in an address, by its name: `L0` of efficientvit_sam_l0."""
    return model.rpartition("_")[2].upper()


def select(text: str, model: str, known: Mapping[str, Address]) -> list[str]:
    """Paths of the operators that an address names, in their order.

    Args:
        text: the address.
        model: name of the model.
        known: addresses by path.

    Raises:
        FieldError: there is no such address; the nearest one is named.
    """
    first, *wanted = text.split(":")
    if not known:
        raise FieldError(text, f"{model} has no addresses: give a path")
    if first.lower() not in (_ANY, model.lower(), label(model).lower()):
        raise FieldError(text, f"is of another model: this is {label(model)}, {_ANY} is each")
    chosen: dict[str, Address] = dict(known)
    for place, (part, given) in enumerate(zip(_PARTS, wanted, strict=True)):
        names = {path: _names(address, place) for path, address in known.items()}
        allowed = _allowed(text, part, given, {name for each in names.values() for name in each})
        chosen = {path: address for path, address in chosen.items() if names[path] & allowed}
    if not chosen and not any(given in ("", _NONE) for given in wanted):
        raise FieldError(text, f"there is no such layer; did you mean {_nearest(text, known)!r}?")
    return list(chosen)


def _names(address: Address, place: int) -> set[str]:
    """What an address may be called in one place."""
    own = {str(address[place])}
    return own | {address.kind} if place == len(_PARTS) - 1 else own


def _allowed(text: str, part: str, given: str, there: set[str]) -> set[str]:
    if given == _ALL:
        return there
    if given == _NONE:
        return set()
    if not given:
        _log.warning("%s names nothing: its list of %ss is empty", text, part)
        return set()
    if given.startswith(_BUT):
        return there - _allowed(text, part, given.removeprefix(_BUT), there)
    names = given.split(",")
    for name in names:
        if name not in there:
            near = difflib.get_close_matches(name, there, n=1) or [", ".join(_sorted(there))]
            raise FieldError(text, f"no {part} is {name!r}; did you mean {near[0]!r}?")
    return set(names)


def _sorted(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (not name.isdigit(), len(name), name))


def _nearest(text: str, known: Mapping[str, Address]) -> str:
    first, *rest = text.split(":")
    addresses = [str(address) for address in known.values()]
    # A kind is no number that is near to others.
    near = difflib.get_close_matches(":".join(rest), addresses, n=1, cutoff=0.0)
    return f"{first}:{near[0]}"
