"""What vit_nano is trained by: masks at sampled points, predicted IoUs, separable features."""

from __future__ import annotations

import torch
from nano_data import NEAR_POINTS, WIDE_POINTS
from torch import Tensor
from torch.nn import functional as F

_SINGLE_WEIGHT = 1.5


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
    return dice + near.mean(-1) + outline + 0.5 * wide.mean(-1)


def near_box(boxes: Tensor, size: int) -> Tensor:
    """1 within boxes [n, 4] grown by a fifth of their sides and two cells; [n, size, size]."""
    margin = 0.2 * (boxes[:, 2:] - boxes[:, :2]) + 2
    low, high = boxes[:, :2] - margin, boxes[:, 2:] + margin
    cell = torch.arange(size) + 0.5
    inside_x = (cell > low[:, :1]) & (cell < high[:, :1])
    inside_y = (cell > low[:, 1:]) & (cell < high[:, 1:])
    return (inside_y[:, :, None] & inside_x[:, None, :]).float()


def total_loss(
    logits: Tensor, ious: Tensor, places: Tensor, labels: Tensor
) -> tuple[Tensor, float]:
    """Loss of the single mask, of the best of three, and of the predicted IoUs; mean single IoU.

    Args:
        logits: masks [n, m, h, w].
        ious: predicted [n, m].
        places: [n, points, 2] in -1..1 of the masks, where they are compared with the object.
        labels: [n, points].
    """
    logits = F.grid_sample(logits, places[:, None], padding_mode="border", align_corners=False)
    logits = logits[:, :, 0]
    losses = mask_loss(logits, labels)
    with torch.no_grad():
        predicted, true = logits[..., :NEAR_POINTS] > 0, labels[:, None, :NEAR_POINTS] > 0.5
        union = (predicted | true).sum(-1).clamp(min=1)
        measured = (predicted & true).sum(-1) / union
    best = losses[:, 1:].min(dim=1).values
    loss = (_SINGLE_WEIGHT * losses[:, 0] + 0.4 * best + F.mse_loss(ious, measured)).mean()
    return loss, float(measured[:, 0].mean())


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
    near = near_box(boxes / stride, target.shape[-1])
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


def sample_points(
    target: Tensor, stride: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """One to three random object points of each mask, in window pixels, and their labels."""
    count = int(torch.randint(1, 4, (), generator=generator))
    weight = target.flatten(1) + 1e-9
    index = torch.multinomial(weight, count, replacement=True, generator=generator)
    size = target.shape[-1]
    points = torch.stack([index % size, index // size], dim=-1) * stride + stride / 2
    return points, torch.ones(points.shape[:2])
