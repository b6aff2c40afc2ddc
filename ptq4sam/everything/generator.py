"""Automatic mask generation: a grid of points in crops of a picture, filtered to good masks.

Written from the paper (Kirillov et al., 2023, section 4 and appendix B) and the documentation of
segment-anything's SamAutomaticMaskGenerator, whose masks it gives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptq4sam.data.segmentation import encode_masks
from ptq4sam.everything.crops import Crop, make_crops
from ptq4sam.everything.filters import (
    cut_off,
    mask_boxes,
    stability,
    without_duplicates,
    without_small_regions,
)
from ptq4sam.everything.masks import FoundMasks
from ptq4sam.everything.points import points_of
from ptq4sam.everything.settings import EverythingSettings
from ptq4sam.everything.tally import (
    CROP_DUPLICATES,
    CUT_OFF,
    DUPLICATES,
    PREDICTED_IOU,
    STABILITY,
    Tally,
)
from ptq4sam.sam.predictor import ImageEmbedding, Predictor

# Bytes that the masks which are looked at together may take; a mask of a picture of 12 megapixels
# takes 48 MB as logits.
_MASK_BYTES = 64 * 2**20


class MaskGenerator:
    """Finds masks of everything in a picture with a SAM, float or quantized.

    A crop is encoded once, and its points are asked in rounds (see `points`). The decoder takes as
    many points at once as the predictor's memory budget allows, and masks that stay are held as
    run lengths, so that memory does not grow with the number of points.

    Attributes:
        predictor: of the SAM.
        settings: how masks are found; those that suit the SAM where none are given.
        tally: what became of all masks that were proposed so far.
    """

    def __init__(self, predictor: Predictor, settings: EverythingSettings | None = None) -> None:
        self.predictor = predictor
        self.settings = settings or EverythingSettings.suited_to(predictor.sam.name)
        self.tally = Tally()

    def generate(self, image: NDArray[np.uint8]) -> FoundMasks:
        """Find masks.

        Args:
            image: RGB [height, width, 3], uint8.

        Raises:
            DataError: the array is not such a picture.
        """
        size = (image.shape[0], image.shape[1])
        crops = make_crops(size, self.settings)
        masks = FoundMasks.joined([self._in_crop(image, crop) for crop in crops])
        if len(crops) > 1:
            # Masks of smaller crops are finer.
            left, top, right, bottom = masks.crops.T
            scores = 1 / ((right - left) * (bottom - top))
            kept = without_duplicates(masks.boxes, scores, self.settings.crop_nms_thresh)
            self.tally.dropped[CROP_DUPLICATES] += len(masks) - len(kept)
            masks = masks.take(kept)
        if self.settings.min_mask_region_area:
            masks = self._cleaned(masks)
        return masks

    def at_points(
        self,
        embedding: ImageEmbedding,
        points: NDArray[np.float64],
        crop: Crop,
        size: tuple[int, int],
        see: Callable[[Tensor], None] = lambda _logits: None,
    ) -> FoundMasks:
        """The good masks of some points, with duplicates.

        Args:
            embedding: the encoded crop.
            points: [n, 2] (x, y) in pixels of the crop.
            crop: where it lies.
            size: (height, width) of the picture.
            see: gets the logits [masks, *crop.size] of the good masks, some at a time.
        """
        at_once = self.predictor.prompts_at_once
        pieces = (points[first : first + at_once] for first in range(0, len(points), at_once))
        return FoundMasks.joined(
            [part for piece in pieces for part in self._decode(embedding, piece, crop, size, see)]
        )

    def _in_crop(self, image: NDArray[np.uint8], crop: Crop) -> FoundMasks:
        embedding = self.predictor.embed(np.ascontiguousarray(crop.of(image)))
        size = (image.shape[0], image.shape[1])
        source = points_of(crop, self.settings)
        masks = FoundMasks.none()
        while len(points := source.ask(masks)):
            found = self.at_points(embedding, points, crop, size, source.see)
            masks = FoundMasks.joined([found, masks])
        kept = without_duplicates(masks.boxes, masks.predicted_ious, self.settings.box_nms_thresh)
        self.tally.dropped[DUPLICATES] += len(masks) - len(kept)
        return masks.take(kept)

    def _decode(
        self,
        embedding: ImageEmbedding,
        points: NDArray[np.float64],
        crop: Crop,
        size: tuple[int, int],
        see: Callable[[Tensor], None],
    ) -> list[FoundMasks]:
        """The good masks of points that are decoded at once."""
        prediction = self.predictor.predict(
            points=points[:, None],
            labels=np.ones((len(points), 1)),
            multimask=True,
            embedding=embedding,
        )
        ious = prediction.iou_predictions.flatten()
        # The cheapest filter comes first: what it drops is not resized.
        threshold = self.settings.pred_iou_thresh
        promising = ((ious > threshold) | (threshold == 0)).nonzero()[:, 0]
        self._count_proposed(len(points), ious, len(promising))
        low_res = prediction.low_res.flatten(0, 1)[promising]
        masks_each = prediction.iou_predictions.shape[1]
        prompts = np.repeat(points + np.array(crop.box[:2]), masks_each, axis=0)
        prompts = prompts[promising.cpu().numpy()]
        ious = ious[promising]
        at_once = max(1, _MASK_BYTES // (4 * max(crop.size[0] * crop.size[1], size[0] * size[1])))
        return [
            self._examine(
                self.predictor.full_resolution(low_res[piece, None], embedding)[:, 0],
                ious[piece],
                prompts[piece],
                crop,
                size,
                see,
            )
            for piece in (
                slice(first, first + at_once) for first in range(0, len(low_res), at_once)
            )
        ]

    def _examine(
        self,
        logits: Tensor,
        ious: Tensor,
        points: NDArray[np.float64],
        crop: Crop,
        size: tuple[int, int],
        see: Callable[[Tensor], None],
    ) -> FoundMasks:
        """The masks among logits [n, *crop.size] that are stable and not cut off."""
        scores = stability(logits, self.settings.stability_score_offset)
        masks = logits > 0
        left, top, right, bottom = crop.box
        boxes = mask_boxes(masks) + logits.new_tensor([left, top, left, top]).long()
        stable = scores >= self.settings.stability_score_thresh
        good = stable & ~cut_off(boxes, crop, size)
        self._count_examined(scores, stable, good)
        if good.any():
            see(logits[good])
        chosen = good.cpu().numpy()
        canvas = np.zeros((int(chosen.sum()), *size), np.bool_)
        canvas[:, top:bottom, left:right] = masks[good].cpu().numpy()
        return FoundMasks(
            encode_masks(canvas),
            boxes[good].cpu().numpy(),
            ious[good].cpu().numpy(),
            scores[good].cpu().numpy(),
            points[chosen],
            np.tile(np.array(crop.box), (len(canvas), 1)),
        )

    def _count_proposed(self, points: int, ious: Tensor, promising: int) -> None:
        self.tally.points += points
        self.tally.masks += len(ious)
        self.tally.dropped[PREDICTED_IOU] += len(ious) - promising
        self.tally.best_iou = max(self.tally.best_iou, float(ious.max()))

    def _count_examined(self, scores: Tensor, stable: Tensor, good: Tensor) -> None:
        self.tally.dropped[STABILITY] += int((~stable).sum())
        self.tally.dropped[CUT_OFF] += int((stable & ~good).sum())
        self.tally.best_stability = max(self.tally.best_stability, float(scores.max()))

    def _cleaned(self, masks: FoundMasks) -> FoundMasks:
        """Masks without small regions; of two that become alike, one that was clean stays."""
        settings = self.settings
        segmentations, boxes = list(masks.segmentations), masks.boxes.copy()
        clean = np.ones(len(masks))
        for place in range(len(masks)):
            before = masks.mask(place)
            after = without_small_regions(before, settings.min_mask_region_area)
            if not np.array_equal(after, before):
                segmentations[place] = encode_masks(after[None])[0]
                boxes[place] = mask_boxes(torch.from_numpy(after[None]))[0].numpy()
                clean[place] = 0
        changed = dataclasses.replace(masks, segmentations=segmentations, boxes=boxes)
        threshold = max(settings.box_nms_thresh, settings.crop_nms_thresh)
        kept = without_duplicates(boxes, clean, threshold)
        self.tally.dropped[DUPLICATES] += len(masks) - len(kept)
        return changed.take(kept)
