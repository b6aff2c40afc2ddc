"""What automatic mask generation can be asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ptq4sam.families import VARIANTS
from ptq4sam.records import Record


@dataclass(frozen=True)
class Hierarchical(Record):
    """Ask a sparse grid of points first, then where no mask is confident.

    Names and defaults are TinySAM's (Shu et al., 2023, section 3.4) where it has them.

    Attributes:
        coarser: the sparse grid has so many times fewer points a side than the whole one.
        high_score_thresh: a point is not asked where the logit of a mask found before is higher.
        relative: the threshold is a share of each mask's highest logit instead.
        grid: "plain" for a sparse and a dense grid that together are that of the plain mode;
            "published" for the points of the release.
        batch: after the sparse grid, ask so many points at a time, the least covered first, and
            look at what they found; 0 asks them all at once, as published.
        patience: stop after so many batches in a row that found no further mask; 0 for never.
        share: of the points of both grids ask at most so many, those of the dense grid that lie
            farthest from all chosen before (ours).
    """

    coarser: int = 4
    high_score_thresh: float = 8.5
    relative: bool = False
    grid: Literal["plain", "published"] = "plain"
    batch: int = 0
    patience: int = 0
    share: float = 1.0

    def _validate(self) -> None:
        self._require(self.coarser >= 2, "coarser", "2 or more")
        if self.relative:
            allowed = "0 to 1, a share of the highest logit, where it is relative"
            self._require(0 <= self.high_score_thresh <= 1, "high_score_thresh", allowed)
        self._require(self.batch >= 0, "batch", "0 or more")
        self._require(self.patience >= 0, "patience", "0 or more")
        self._require(
            self.patience == 0 or self.batch > 0, "patience", "0 where points are asked at once"
        )
        self._require(0 < self.share <= 1, "share", "above 0, to 1")


@dataclass(frozen=True)
class EverythingSettings(Record):
    """How masks of a whole picture are found; names and defaults are segment-anything's.

    Attributes:
        points_per_side: points of the grid along one side of the whole picture.
        pred_iou_thresh: masks stay whose IoU, as the model predicts it, is higher; 0 keeps all.
        stability_score_thresh: masks with a lower stability are dropped.
        stability_score_offset: stability is the IoU of the mask cut at this logit above zero and
            the one cut at as much below.
        box_nms_thresh: of two masks of one crop whose boxes overlap by a higher IoU, the one with
            the lower predicted IoU is dropped.
        crop_n_layers: also look into 4, 16, ... crops of the picture, as many layers.
        crop_nms_thresh: as box_nms_thresh between crops, where that of the smaller crop stays.
        crop_overlap_ratio: overlap of the crops of the first layer, as a share of the picture's
            shorter side; half of that in the next layer, and so on.
        crop_n_points_downscale_factor: each layer has so many times fewer points a side.
        min_mask_region_area: holes and islands of a mask with fewer pixels are removed; 0 for none.
        hierarchical: of each crop's grid ask only the points that a sparse one leaves unclear; None
            asks all.
    """

    points_per_side: int = 32
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    stability_score_offset: float = 1.0
    box_nms_thresh: float = 0.7
    crop_n_layers: int = 0
    crop_nms_thresh: float = 0.7
    crop_overlap_ratio: float = 512 / 1500
    crop_n_points_downscale_factor: int = 1
    min_mask_region_area: int = 0
    hierarchical: Hierarchical | None = None

    @classmethod
    def suited_to(cls, name: str) -> EverythingSettings:
        """Those of a SAM by its name: SAM's own, with what suits the variant's weights better."""
        variant = VARIANTS.get(name)
        return cls(**({} if variant is None else variant.everything))

    def _validate(self) -> None:
        self._require(self.points_per_side >= 1, "points_per_side", "1 or more")
        # A layer has four times the crops of the one before: the sixth has 4,096.
        self._require(0 <= self.crop_n_layers <= 5, "crop_n_layers", "0 to 5")
        for name in ("box_nms_thresh", "crop_nms_thresh", "stability_score_thresh"):
            self._require(0 <= getattr(self, name) <= 1, name, "0 to 1")
        self._require(self.stability_score_offset >= 0, "stability_score_offset", "0 or more")
        self._require(0 <= self.crop_overlap_ratio < 1, "crop_overlap_ratio", "0 to below 1")
        factor = self.crop_n_points_downscale_factor
        self._require(factor >= 1, "crop_n_points_downscale_factor", "1 or more")
        self._require(
            self.points_per_side >= factor**self.crop_n_layers,
            "crop_n_points_downscale_factor",
            f"a factor that leaves a point to layer {self.crop_n_layers}",
        )
        self._require(self.min_mask_region_area >= 0, "min_mask_region_area", "0 or more")

    def points_in_layer(self, layer: int) -> int:
        """Points a side of a crop; layer 0 is the whole picture."""
        # As published: floating division, so that 32 points and factor 3 give 32, 10, 3.
        return int(self.points_per_side / self.crop_n_points_downscale_factor**layer)
