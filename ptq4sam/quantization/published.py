"""The two methods of PTQ4SAM (Lv et al., CVPR 2024): their settings, and the published keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ptq4sam.quantization.slots import SlotFormat
from ptq4sam.records import Record

TAUS = (1, 2, 4)
"""Granularities of softmax outputs: points spaced by factors of 2, 2^(1/2) and 2^(1/4)."""
BIMODAL = "bimodal-integration"
"""Name among the methods."""


@dataclass(frozen=True)
class BimodalIntegration(Record):
    """How two peaks are found (PTQ4SAM, section 3.2).

    Attributes:
        global_num: points at which the density of the activations is estimated.
        peak_distance: smallest distance between two peaks, in points.
        peak_height: smallest height of a peak, as a share of the sum of the density.
    """

    global_num: int = 128
    peak_distance: int = 32
    peak_height: float = 0.01

    def _validate(self) -> None:
        self._require(self.global_num >= 3, "global_num", "3 or more")
        self._require(
            1 <= self.peak_distance <= self.global_num,
            "peak_distance",
            f"1 to global_num ({self.global_num})",
        )
        self._require(0 < self.peak_height < 1, "peak_height", "between 0 and 1")


@dataclass(frozen=True)
class AdaptiveGranularity(Record):
    """How the granularity of a softmax output is found (PTQ4SAM, section 3.3).

    Attributes:
        exact: ours; search granularities as published, on all queries: several times the
            work, for the same granularity and a scale that differs by less than 2 %.
        taus: ours; the granularities that the search chooses from, of TAUS; one alone is fixed.
        search: ours; "bounded" minimisation, as published, ends in one of many minima; "grid" looks
            at scales everywhere first, for less error in less time (`exact` does not matter then).
    """

    exact: bool = False
    taus: tuple[int, ...] = TAUS
    search: Literal["bounded", "grid"] = "bounded"

    def _validate(self) -> None:
        some = 0 < len(self.taus) == len({*self.taus} & {*TAUS})
        self._require(some, "taus", f"some of {', '.join(map(str, TAUS))}, each once")


@dataclass(frozen=True)
class Methods(Record):
    """The two methods of PTQ4SAM (Lv et al., CVPR 2024), by their published keys.

    `BIG: true` means the same as bimodal-integration among `methods`, `AGQ: true` as a logarithmic
    grid for the slot softmax.

    Attributes:
        BIG: bimodal integration of the post-key activations in the decoder (section 3.2).
        AGQ: adaptive granularity quantization of softmax outputs (section 3.3); ours: "decoder" for
            those of the mask decoder alone, which leaves the image encoder, where runtimes have
            integer products for evenly spaced codes only, its speed.
        global_num: of BimodalIntegration.
        peak_distance: of BimodalIntegration.
        peak_height: of BimodalIntegration.
        exact: of AdaptiveGranularity.
        taus: of AdaptiveGranularity.
        search: of AdaptiveGranularity.
    """

    BIG: bool = False
    AGQ: bool | Literal["decoder"] = False
    global_num: int = 128
    peak_distance: int = 32
    peak_height: float = 0.01
    exact: bool = False
    taus: tuple[int, ...] = TAUS
    search: Literal["bounded", "grid"] = "bounded"

    def _validate(self) -> None:
        # Each checks its own.
        _ = self.bimodal, self.granularity

    @property
    def bimodal(self) -> BimodalIntegration:
        """Settings of bimodal integration."""
        return BimodalIntegration(self.global_num, self.peak_distance, self.peak_height)

    @property
    def granularity(self) -> AdaptiveGranularity:
        """Settings of adaptive granularity."""
        return AdaptiveGranularity(self.exact, self.taus, self.search)

    def slot_formats(self) -> dict[str, SlotFormat]:
        """What the published keys say of slots."""
        formats = {}
        if self.AGQ:
            selector = "softmax" if self.AGQ is True else "softmax@decoder"
            formats[selector] = SlotFormat("logarithmic", None, self.granularity)
        return formats
