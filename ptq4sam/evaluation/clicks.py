"""Objects found by clicks: the first in the middle, each next one where the mask is most wrong.

The usual protocol of interactive segmentation (Sofiiuk et al., 2021; Kirillov et al., 2023,
section 7.1): a click lies at the place that is farthest from the border of what it is about. The
first asks for three masks, of which the one with the best predicted IoU is kept, since one click is
ambiguous; later ones ask for one mask and give the mask so far as a prompt too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy
import torch
from numpy.typing import NDArray

from ptq4sam.evaluation.overlap import mask_ious
from ptq4sam.evaluation.segmentation import Segmented
from ptq4sam.sam.predictor import ImageEmbedding, Predictor


@dataclass(frozen=True)
class Clicked:
    """Masks of the objects of one picture after some clicks each.

    Attributes:
        segmented: masks after the last click; their scores are the predicted IoUs.
        ious: with the truth after each click, float64 [n, clicks].
        best_of_three: the same of the best of the first click's three masks, by the truth [n].
    """

    segmented: Segmented
    ious: NDArray[np.float64]
    best_of_three: NDArray[np.float64]


def segment_by_clicks(
    predictor: Predictor,
    embedding: ImageEmbedding,
    truth: NDArray[np.bool_],
    clicks: int,
) -> Clicked:
    """Click on objects until each has had `clicks` clicks.

    Args:
        predictor: a float or quantized SAM.
        embedding: the encoded picture.
        truth: masks of the objects, bool [n, height, width], n at least 1.
        clicks: how many, at least 1.
    """
    masks = np.zeros_like(truth)
    points = np.zeros((len(truth), 0, 2))
    labels = np.zeros((len(truth), 0), np.int64)
    logits: torch.Tensor | None = None
    ious = []
    best_of_three = np.zeros(len(truth))
    for number in range(clicks):
        placed = [next_click(wanted, found) for wanted, found in zip(truth, masks, strict=True)]
        points = np.concatenate([points, [[place] for place, _ in placed]], axis=1)
        labels = np.concatenate([labels, [[label] for _, label in placed]], axis=1)
        prediction = predictor.predict(
            points=points, labels=labels, masks=logits, multimask=number == 0, embedding=embedding
        )
        predicted, chosen = prediction.iou_predictions.max(dim=1)
        row = torch.arange(len(truth), device=chosen.device)
        logits = prediction.low_res[row, chosen][:, None]
        masks = predictor.binary_masks(logits, embedding)[:, 0].cpu().numpy()
        ious.append(mask_ious(masks, truth))
        if number == 0:
            best_of_three = _best(predictor, embedding, prediction.low_res, truth)
    if logits is None:
        raise ValueError(f"{clicks} clicks: at least one is needed")
    scores = predicted.cpu().numpy()
    return Clicked(
        Segmented(masks, scores, scores, logits[:, 0]), np.stack(ious, axis=1), best_of_three
    )


def next_click(
    truth: NDArray[np.bool_], mask: NDArray[np.bool_]
) -> tuple[tuple[float, float], int]:
    """The middle of the largest error: the pixel farthest from the border of what is wrong.

    Args:
        truth: the object, bool [height, width].
        mask: what was found of it so far.

    Returns:
        (x, y) of a pixel, and its label: 1 where the object was missed, 0 where too much was found.
        Where nothing is wrong, the middle of the object.
    """
    missed, excess = truth & ~mask, mask & ~truth
    if not missed.any() and not excess.any():
        missed = truth
    (missed_depth, missed_at), (excess_depth, excess_at) = _middle(missed), _middle(excess)
    return (missed_at, 1) if missed_depth >= excess_depth else (excess_at, 0)


def _middle(region: NDArray[np.bool_]) -> tuple[float, tuple[float, float]]:
    """Depth in pixels and place (x, y) of the pixel farthest from the border; depth 0 of nothing.

    The picture's own border counts as one.
    """
    if not region.any():
        return 0.0, (0.0, 0.0)
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    part = region[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    depth = scipy.ndimage.distance_transform_edt(np.pad(part, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(int(depth.argmax()), depth.shape)
    return float(depth[row, column]), (float(columns[0] + column), float(rows[0] + row))


def _best(
    predictor: Predictor,
    embedding: ImageEmbedding,
    low_res: torch.Tensor,
    truth: NDArray[np.bool_],
) -> NDArray[np.float64]:
    """IoU [n] of the best of the masks [n, 3, rows, columns] of each object."""
    best = np.zeros(len(truth))
    for number in range(low_res.shape[1]):
        masks = predictor.binary_masks(low_res[:, number : number + 1], embedding)[:, 0]
        best = np.maximum(best, mask_ious(masks.cpu().numpy(), truth))
    return best
