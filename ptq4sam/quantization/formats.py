"""Number formats of weights and activations, as schemes say them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ptq4sam.quantization.registry import OBSERVERS, QUANTIZERS
from ptq4sam.quantization.slots import ADAROUND, HEADS, PER_GROUP, with_ch_axis
from ptq4sam.records import FieldError, Record

PER_TENSOR_OBSERVER_NAMES = (
    "AvgMinMaxObserver",
    "AvgMSEObserver",
    "AvgMSEFastObserver",
)
LEARNED_SCALE_QUANTIZER_NAMES = ("LSQFakeQuantize", "LSQPlusFakeQuantize")


@dataclass(frozen=True)
class TensorFormat(Record):
    """Number format of the weights or of the activations.

    Attributes:
        quantizer: a name in QUANTIZERS.
        observer: a name in OBSERVERS.
        bit: bits, 2 to 16.
        symmetric: zero point 0 on a signed grid, else an unsigned grid with a zero point.
        ch_axis: 0 for a scale per output channel, -1 for one per tensor, 1 for one per head of a
            query, key or value. Files may say `granularity: per channel`, `per tensor` or `per
            head` instead, which goes before.
        group_size: ours; with `granularity: per group`, input channels of a weight that share a
            scale, one power of two of the channel's step; 0 for all.
    """

    quantizer: str
    observer: str
    bit: int
    symmetric: bool = False
    ch_axis: int = -1
    group_size: int = 0

    @classmethod
    def _renamed(cls, mapping: Mapping[str, Any]) -> Mapping[str, Any]:
        if mapping.get("granularity") == PER_GROUP and not mapping.get("group_size"):
            raise FieldError("group_size", f"missing; {PER_GROUP} needs one, as 32")
        if mapping.get("granularity", PER_GROUP) != PER_GROUP and mapping.get("group_size"):
            raise FieldError(
                "group_size",
                f"{mapping['group_size']} given with granularity: {mapping['granularity']}: set "
                f"it to 0, or granularity to {PER_GROUP}",
            )
        return with_ch_axis(mapping)

    def to_dict(self) -> dict[str, Any]:
        """Without groups as files always were."""
        found = super().to_dict()
        return found if self.group_size else {k: v for k, v in found.items() if k != "group_size"}

    def _validate_groups(self) -> None:
        self._require(self.group_size >= 0, "group_size", "1 or more, or 0 for no groups")
        if not self.group_size:
            return
        self._require(self.ch_axis == 0, "group_size", f"it with granularity: {PER_GROUP} only")
        if self.quantizer in LEARNED_SCALE_QUANTIZER_NAMES:
            raise FieldError(
                "quantizer",
                f"{self.quantizer} learns scales, those of groups are powers of two of one step: "
                f"use FixedFakeQuantize or {ADAROUND}",
            )

    def _validate(self) -> None:
        QUANTIZERS.require(self.quantizer, "quantizer")
        OBSERVERS.require(self.observer, "observer")
        self._require(2 <= self.bit <= 16, "bit", "2 to 16")
        self._validate_groups()
        allowed = "-1 (per tensor), 0 (per channel), 1 (per head)"
        self._require(self.ch_axis in (-1, 0, HEADS), "ch_axis", allowed)
        if self.ch_axis >= 0 and _is_per_tensor_only(self.observer):
            channelwise = [name for name in OBSERVERS.names if not _is_per_tensor_only(name)]
            raise FieldError(
                "observer",
                f"{self.observer} works per tensor only: set ch_axis to -1, "
                f"or use one of {', '.join(channelwise)}",
            )


def _is_per_tensor_only(observer: str) -> bool:
    if observer in PER_TENSOR_OBSERVER_NAMES:
        return True
    kind = OBSERVERS.get(observer)
    return kind is not None and (kind.per_tensor_only or kind.averages)
