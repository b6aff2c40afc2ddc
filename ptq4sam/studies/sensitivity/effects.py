"""What quantizers do to one model's outputs, added up over pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptq4sam.evaluation import mean_iou_by_size

METRICS = ("mean_iou", "AP", "agreement")
"""What masks are measured by: against the truth, in shares and in percent, and the float masks."""


@dataclass(frozen=True)
class Power:
    """Of a tensor and of its error: sums of squares."""

    signal: float
    noise: float

    @classmethod
    def of(cls, exact: Tensor, x: Tensor) -> Power:
        """Of a tensor against the exact one, of the same shape."""
        wide = exact.to(torch.float64)
        return cls(float(wide.square().sum()), float((x - wide).square().sum()))


@dataclass(frozen=True)
class PictureEffect:
    """What one picture shows; plain values, that JSON keeps exactly.

    Attributes:
        embedding: error of the encoder's output, signal and noise.
        logits: error of the mask logits where the picture is, signal and noise.
        ious: of each mask with the truth; empty without.
        areas: of the objects of these, in pixels.
        agreement: of each mask with the float one.
        results: masks in the COCO results format; empty where no AP is asked for.
    """

    embedding: tuple[float, float]
    logits: tuple[float, float]
    ious: list[float] = field(default_factory=list)
    areas: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Effect:
    """What some quantizers do.

    Attributes:
        embedding_sqnr_db: signal-to-quantization-noise ratio at the encoder's output in dB; None
            where it has no error.
        embedding_relative_error: root of noise over signal.
        logits_sqnr_db: the same of the mask logits.
        logits_relative_error: the same of the mask logits.
        agreement: mean IoU with the masks of the float model.
        mean_iou: with the truth; None where the truth is not known.
        AP: in percent; None where it was not measured.
        mean_iou_large: as `mean_iou`, of large objects; None also where there is none.
        mean_iou_medium: of those of medium size.
        mean_iou_small: of small ones.
    """

    embedding_sqnr_db: float | None
    embedding_relative_error: float
    logits_sqnr_db: float | None
    logits_relative_error: float
    agreement: float
    mean_iou: float | None = None
    AP: float | None = None
    mean_iou_large: float | None = None
    mean_iou_medium: float | None = None
    mean_iou_small: float | None = None


def add_up(pictures: Sequence[PictureEffect], ap: float | None = None) -> Effect:
    """The effect on all pictures.

    Args:
        pictures: what each shows.
        ap: the AP on all of them, where it was measured.
    """
    embedding = _ratio([picture.embedding for picture in pictures])
    logits = _ratio([picture.logits for picture in pictures])
    ious = [iou for picture in pictures for iou in picture.ious]
    areas = [area for picture in pictures for area in picture.areas]
    agreement = [iou for picture in pictures for iou in picture.agreement]
    by_size = mean_iou_by_size(ious, areas) if ious else {}
    return Effect(
        _decibels(embedding),
        math.sqrt(embedding),
        _decibels(logits),
        math.sqrt(logits),
        float(np.mean(agreement)),
        AP=ap,
        **{name: None if math.isnan(value) else value for name, value in by_size.items()},
    )


def _ratio(powers: Sequence[tuple[float, float]]) -> float:
    """Noise over signal."""
    signal = math.fsum(power[0] for power in powers)
    return math.fsum(power[1] for power in powers) / max(signal, 1e-300)


def _decibels(ratio: float) -> float | None:
    return -10 * math.log10(ratio) if ratio > 0 else None
