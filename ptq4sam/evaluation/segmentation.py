"""Boxes to scored masks: one mask a box, the best of three, or a cascade (PTQ4SAM, section 4.1)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptq4sam.evaluation.prompting import Prompting
from ptq4sam.sam.predictor import ImageEmbedding, Predictor


@dataclass(frozen=True)
class Segmented:
    """Masks of one picture.

    Attributes:
        masks: bool [n, height, width].
        scores: [n].
        predicted_ious: [n].
        logits: of the masks, on the padded input at a quarter of its size [n, rows, columns]; where
            the model computed them.
    """

    masks: NDArray[np.bool_]
    scores: NDArray[np.float32]
    predicted_ious: NDArray[np.float32]
    logits: Tensor


def segment(
    predictor: Predictor,
    embedding: ImageEmbedding,
    boxes: NDArray[np.float32],
    scores: NDArray[np.float32],
    prompting: Prompting,
) -> Segmented:
    """Predict and score one mask a box.

    Args:
        predictor: a float or quantized SAM.
        embedding: the encoded picture.
        boxes: [n, 4] xyxy in original pixels.
        scores: [n] of the detector.
        prompting: how.
    """
    if len(boxes) == 0:
        empty = np.zeros(0, np.float32)
        masks_of_none = np.zeros((0, *embedding.original_size), np.bool_)
        no_logits = embedding.features.new_empty(0, *predictor.sam.mask_input_size)
        return Segmented(masks_of_none, empty, empty, no_logits)
    logits, ious = _predict(predictor, embedding, boxes, None, prompting)
    if prompting.cascade:
        logits, ious = _predict(predictor, embedding, boxes, logits, prompting)
    masks = predictor.binary_masks(logits, embedding)[:, 0]
    total = torch.from_numpy(scores).to(ious)
    if not prompting.keep_scores:
        total = total * (ious if prompting.use_sam_iou else _probability_inside(logits))
    return Segmented(masks.cpu().numpy(), total.cpu().numpy(), ious.cpu().numpy(), logits[:, 0])


def _predict(
    predictor: Predictor,
    embedding: ImageEmbedding,
    boxes: NDArray[np.float32],
    masks: Tensor | None,
    prompting: Prompting,
) -> tuple[Tensor, Tensor]:
    """Logits [n, 1, h, w] and predicted IoUs [n] of the mask that is kept for each box."""
    multimask = prompting.multimask or prompting.best_in_multi_mask
    prediction = predictor.predict(
        boxes=boxes, masks=masks, multimask=multimask, embedding=embedding
    )
    row = torch.arange(len(boxes), device=prediction.iou_predictions.device)
    if prompting.best_in_multi_mask:
        chosen = prediction.iou_predictions.argmax(dim=1)
    else:
        chosen = torch.zeros_like(row)
    return prediction.low_res[row, chosen][:, None], prediction.iou_predictions[row, chosen]


def _probability_inside(logits: Tensor) -> Tensor:
    """Mean probability of the pixels in each mask [n, 1, h, w]; 0 for an empty mask."""
    inside = (logits > 0).flatten(1)
    total = (logits.sigmoid().flatten(1) * inside).sum(dim=1)
    return total / inside.sum(dim=1).clamp(min=1)
