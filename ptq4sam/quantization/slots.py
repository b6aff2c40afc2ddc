"""Formats by slot and role: the part of a scheme that says what single kinds of tensors have.

A selector is a slot, as `softmax`, or a slot with roles, as `input@decoder@after-relu`. What roles
a slot has is said by the description of the model. Nothing here needs torch, unless a scheme names
a grid.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ptq4sam.quantization.registry import GRIDS, OBSERVERS, QUANTIZERS
from ptq4sam.records import FieldError, Record, unknown_key

STATE = "state"
SLOTS = ("weight", "input", "query", "key", "value", "softmax", STATE)
"""Places of operators where quantizers sit; `state` is that of a linear attention."""
AFFINE = "affine"
ADAROUND = "AdaRoundFakeQuantize"
"""The quantizer that learns the rounding of weights."""
WEIGHT = "weight"

PER_GROUP, PER_HEAD = "per group", "per head"
HEADS = 1
"""Axis of an attention's query, key and value, which heads have scales along."""
_OF_HEADS = ("query", "key", "value")
_BYTE_BITS = 8
GRANULARITIES = {"per tensor": -1, "per channel": 0, PER_GROUP: 0, PER_HEAD: HEADS}
"""What has a scale of its own, and the published way to write it, `ch_axis`."""


def octaves(bits: int, symmetric: bool) -> int:
    """Powers of two by which scales of a weight's groups may differ within a byte."""
    return max(0, _BYTE_BITS - bits - (not symmetric))


def require_heads(ch_axis: int | None, slot: str) -> None:
    """Refuse a scale for each head where there are no heads.

    Raises:
        FieldError: where there are is named.
    """
    if ch_axis == HEADS and slot not in _OF_HEADS:
        raise FieldError(
            "granularity",
            f"{PER_HEAD!r} given for {slot}, which is for {', '.join(_OF_HEADS)} of attentions: "
            f"slots: {{{_OF_HEADS[0]}: {{granularity: {PER_HEAD}}}}}",
        )


def with_ch_axis(mapping: Mapping[str, Any]) -> Mapping[str, Any]:
    """A mapping with `ch_axis` in the place of `granularity`.

    Raises:
        FieldError: there is no such granularity.
    """
    if "granularity" not in mapping:
        return mapping
    given = mapping["granularity"]
    if given not in GRANULARITIES:
        raise FieldError("granularity", f"{given!r} given, allowed: {', '.join(GRANULARITIES)}")
    others = {key: value for key, value in mapping.items() if key != "granularity"}
    return {**others, "ch_axis": GRANULARITIES[given]}


@dataclass(frozen=True)
class AffineFormat(Record):
    """What an affine slot has other than the scheme's own format; None is as there."""

    quantizer: str | None = None
    observer: str | None = None
    symmetric: bool | None = None
    ch_axis: int | None = None

    @classmethod
    def _renamed(cls, mapping: Mapping[str, Any]) -> Mapping[str, Any]:
        if mapping.get("granularity") == PER_GROUP:
            raise FieldError(
                "granularity",
                f"{PER_GROUP!r} given, which is of all weights, in w_qconfig; inputs of linear "
                "layers can have {grid: grouped}",
            )
        return with_ch_axis(mapping)

    def _validate(self) -> None:
        if self.quantizer is not None:
            QUANTIZERS.require(self.quantizer, "quantizer")
        if self.observer is not None:
            OBSERVERS.require(self.observer, "observer")


@dataclass(frozen=True)
class SlotFormat(Record):
    """The format of a kind of slots.

    Attributes:
        grid: a name in GRIDS.
        bit: bits of a code; None for the scheme's.
        settings: a record of the grid's.
    """

    grid: str
    bit: int | None
    settings: object

    def to_dict(self) -> dict[str, Any]:
        """Flat, as schemes have it."""
        assert isinstance(self.settings, Record)
        return {"grid": self.grid, "bit": self.bit, **self.settings.to_dict()}


def slot_formats(given: Mapping[str, object]) -> dict[str, SlotFormat]:
    """Read formats by selector.

    Raises:
        FieldError: a slot, grid or setting does not exist, or a value is not usable.
    """
    found = {}
    for selector, value in given.items():
        slot, *_ = selector.split("@")
        if slot not in SLOTS:
            raise unknown_key(slot, SLOTS).within("slots")
        try:
            found[selector] = value if isinstance(value, SlotFormat) else _read(value)
            _check(found[selector], slot)
        except FieldError as error:
            raise error.within(f"slots.{selector}") from None
    return found


def _check(said: SlotFormat, slot: str) -> None:
    """Refuse a format that a slot cannot have.

    Raises:
        FieldError: its grid, granularity or quantizer is for other slots.
    """
    if said.grid != AFFINE and slot not in GRIDS[said.grid].slots:
        others = ", ".join(GRIDS[said.grid].slots)
        raise FieldError("grid", f"{said.grid!r} given, which is for {others}")
    settings = said.settings
    if not isinstance(settings, AffineFormat):
        return
    require_heads(settings.ch_axis, slot)
    if slot == WEIGHT:
        return
    if settings.ch_axis == 0:
        raise FieldError("ch_axis", "activations are quantized per tensor: -1")
    if settings.quantizer == ADAROUND:
        allowed = ", ".join(name for name in QUANTIZERS.names if name != ADAROUND)
        raise FieldError("quantizer", f"{ADAROUND} is for weights; allowed: {allowed}")


def _read(value: object) -> SlotFormat:
    if not isinstance(value, Mapping):
        raise FieldError("", f"{value!r} given, keys and values are needed, as grid: hybrid")
    own = dict(value)
    grid, bit = own.pop("grid", AFFINE), own.pop("bit", None)
    GRIDS.require(str(grid), "grid")
    if bit is not None and not (isinstance(bit, int) and 2 <= bit <= 16):
        raise FieldError("bit", f"{bit!r} given, allowed: 2 to 16")
    kind = AffineFormat if grid == AFFINE else GRIDS[grid].settings_type
    return SlotFormat(grid, bit, kind.from_section(own))


def selected(
    formats: Mapping[str, SlotFormat], slot: str, roles: frozenset[str]
) -> SlotFormat | None:
    """The format for a slot with these roles: of most roles, of several the last; None without."""
    found, most = None, -1
    for selector, format_ in formats.items():
        name, *wanted = selector.split("@")
        if name == slot and roles.issuperset(wanted) and len(wanted) >= most:
            found, most = format_, len(wanted)
    return found


def require_slots(formats: Collection[str], there: Collection[tuple[str, frozenset[str]]]) -> None:
    """Refuse selectors that fit no slot of a model.

    Args:
        formats: selectors, whose roles are known.
        there: slots of the model, with their roles.

    Raises:
        FieldError: what there is instead is named.
    """
    for selector in formats:
        slot, *wanted = selector.split("@")
        if not any(slot == name and roles.issuperset(wanted) for name, roles in there):
            roles = sorted({role for name, its in there if name == slot for role in its})
            instead = (
                f"roles of its {slot} are {', '.join(roles)}"
                if roles
                else f"its slots are {', '.join(sorted({name for name, _ in there}))}"
            )
            raise FieldError(f"slots.{selector}", f"the model has no such slot; {instead}")


def require_roles(formats: Collection[str], known: Collection[str]) -> None:
    """Refuse selectors with roles that a model has not.

    Raises:
        FieldError: the nearest known one is named.
    """
    for selector in formats:
        for role in selector.split("@")[1:]:
            if role not in known:
                raise unknown_key(role, sorted(known)).within(f"slots.{selector}")
