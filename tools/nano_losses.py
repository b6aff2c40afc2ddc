"""What vit_nano is trained by: masks at sampled points, predicted IoUs, separable features."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ptq4sam.distillation.losses import at_places, near_box
from ptq4sam.distillation.views import NEAR_POINTS, WIDE_POINTS

_SINGLE_WEIGHTS = (1.5, 0.5)
_BEST_WEIGHTS = (0.4, 1.5)
_IOU_WEIGHT = 2.0


def mask_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Dice plus cross entropy near the box, and some cross entropy anywhere.

    A third of the near points, those nearest to the outline of the mask as it is, count twice: most
    points are soon right, and outlines are what is left (Kirillov et al., PointRend, 2020).

    Args:
        logits: [n, m, points], the near ones first.
        labels: [n, points].

    Returns:
        [n, m].
    """
    labels = labels[:, None].expand_as(logits)
    entropy = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    probability, truth = logits[..., :NEAR_POINTS].sigmoid(), labels[..., :NEAR_POINTS]
    dice = 1 - (2 * (probability * truth).sum(-1) + 1) / ((probability + truth).sum(-1) + 1)
    near, wide = entropy.split([NEAR_POINTS, WIDE_POINTS], dim=-1)
    certainty = logits[..., :NEAR_POINTS].detach().abs()
    uncertain = certainty.topk(NEAR_POINTS // 3, largest=False).indices
    outline = near.gather(-1, uncertain).mean(-1)
    return dice + near.mean(-1) + outline + wide.mean(-1)


def total_loss(
    logits: Tensor,
    ious: Tensor,
    places: Tensor,
    labels: Tensor,
    measured: Tensor,
    ambiguous: Tensor,
) -> Tensor:
    """Loss of the single mask, of the best of three, and of the predicted IoUs.

    The single mask is what a clear prompt asks for, the best of three what a lone click does.

    Args:
        logits: masks [n, m, h, w].
        ious: predicted [n, m].
        places: [n, points, 2] in -1..1 of the masks, where they are compared with the object.
        labels: [n, points].
        measured: IoU [n, m] of the masks with the object.
        ambiguous: [n] whether the prompt is a lone click.
    """
    losses = mask_loss(at_places(logits, places), labels)
    best = losses[:, 1:].min(dim=1).values
    single, three = (
        torch.where(ambiguous, weights[1], weights[0])
        for weights in (_SINGLE_WEIGHTS, _BEST_WEIGHTS)
    )
    return (single * losses[:, 0] + three * best).mean() + _IOU_WEIGHT * F.mse_loss(ious, measured)


def feature_loss(features: Tensor, target: Tensor) -> Tensor:
    """Squared error of foretold feature maps [b, c, h, w], a channel's variance being one."""
    mean = target.mean(dim=(0, 2, 3), keepdim=True)
    spread = target.std(dim=(0, 2, 3), keepdim=True).clamp(min=1e-3)
    return F.mse_loss(features, ((target - mean) / spread).clamp(-5, 5))


def separation_loss(features: Tensor, target: Tensor, boxes: Tensor, stride: float) -> Tensor:
    """Cross entropy of telling each object from what is around it by the means of its features.

    A mask is the product of pixel features and a vector that the decoder makes from the prompt:
    neither learns before the other tells something. This asks the pixel features alone.

    Args:
        features: [n, channels, h, w] before that product.
        target: [n, h, w] in 0..1.
        boxes: [n, 4] in pixels of the window.
        stride: pixels a cell.
    """
    near = near_box(boxes, target.shape[-1], stride)
    inside, outside = (target * near).flatten(1), ((1 - target) * near).flatten(1)
    flat = F.instance_norm(features).flatten(2)
    front = (flat * inside[:, None]).sum(-1) / inside.sum(-1, keepdim=True).clamp(min=1)
    back = (flat * outside[:, None]).sum(-1) / outside.sum(-1, keepdim=True).clamp(min=1)
    direction, middle = front - back, (front + back) / 2
    logits = torch.einsum("nc,ncp->np", direction, flat - middle[..., None])
    logits = logits * (8 / features.shape[1])
    entropy = F.binary_cross_entropy_with_logits(logits, target.flatten(1), reduction="none")
    weight = inside / inside.sum(-1, keepdim=True).clamp(min=1) + outside / outside.sum(
        -1, keepdim=True
    ).clamp(min=1)
    return (entropy * weight).sum(-1).mean() / 2
