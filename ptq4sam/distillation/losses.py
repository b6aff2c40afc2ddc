"""The terms of a distillation's loss (TinySAM, Shu et al. 2025), and what masks are worth.

L1 distances from the teacher: squares of differences would be too small to learn from. Masks are
compared with the truth at places in the picture's own resolution, near outlines most (PointRend,
Kirillov et al. 2020).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ptq4sam.distillation.views import NEAR_POINTS

_FOCUS = 2.0
"""Gamma of the focal loss (Lin et al. 2017).

Its alpha, a fourth of the weight for the object and three for what is around it, is for pictures
that are background nearly everywhere. Of places near outlines half are in the object: with it
masks shrink, to 0.7 of their area, for it makes background of what is object as often as not.
"""
_LEAST = 1e-6


def distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean L1 distance: of embeddings, or of output tokens."""
    return F.l1_loss(student.float(), teacher.float())


def mask_distance(student: Tensor, teacher: Tensor, hardness: Tensor) -> Tensor:
    """Mean L1 distance of mask logits [n, m, h, w], each mask weighed by its hardness [n, m]."""
    each = (student.float() - teacher.float()).abs().flatten(2).mean(-1)
    return (hardness * each).mean()


def hardness(teacher_iou: Tensor, student_iou: Tensor) -> Tensor:
    """How much a mask matters, by the IoUs of both with the truth.

    0.5 where both are equally good, up to 1 where the student is far behind, 0.27 where the teacher
    has nothing.
    """
    return torch.sigmoid(teacher_iou / (student_iou + _LEAST) - 1)


def truth_loss(sampled: Tensor, labels: Tensor, focal: float, dice: float) -> Tensor:
    """Weighted focal and dice loss of masks against the truth: [n, m].

    Args:
        sampled: logits of masks at places [n, m, points], the near ones first.
        labels: [n, points].
        focal: weight.
        dice: weight; of the places near the object.
    """
    truth = labels[:, None].expand_as(sampled)
    entropy = F.binary_cross_entropy_with_logits(sampled, truth, reduction="none")
    probability = sampled.sigmoid()
    missed = (probability - truth).abs()
    by_place = (missed.pow(_FOCUS) * entropy).mean(-1)
    near, inside = probability[..., :NEAR_POINTS], truth[..., :NEAR_POINTS]
    overlap = (2 * (near * inside).sum(-1) + 1) / ((near + inside).sum(-1) + 1)
    return focal * by_place + dice * (1 - overlap)


def asked_for(losses: Tensor, lone: Tensor) -> Tensor:
    """Mean loss of the masks that prompts ask for, of the losses of all four [n, 4].

    A clear prompt asks for the single mask, the first; a lone click for the best of the three
    others.
    """
    return torch.where(lone, losses[:, 1:].min(dim=1).values, losses[:, 0]).mean()


def at_places(logits: Tensor, places: Tensor) -> Tensor:
    """Logits of masks [n, m, h, w] at places [n, points, 2] in -1..1: [n, m, points]."""
    return F.grid_sample(logits, places[:, None], padding_mode="border", align_corners=False)[
        :, :, 0
    ]


def near_box(boxes: Tensor, size: int, stride: float) -> Tensor:
    """1 within boxes [n, 4] grown by a fifth of their sides and two pixels; [n, size, size]."""
    margin = 0.2 * (boxes[:, 2:] - boxes[:, :2]) + 2
    low, high = boxes[:, :2] - margin, boxes[:, 2:] + margin
    cell = stride * (torch.arange(size, device=boxes.device) + 0.5)
    inside_x = (cell > low[:, :1]) & (cell < high[:, :1])
    inside_y = (cell > low[:, 1:]) & (cell < high[:, 1:])
    return (inside_y[:, :, None] & inside_x[:, None, :]).float()


@torch.no_grad()
def measured_iou(
    logits: Tensor, places: Tensor, labels: Tensor, boxes: Tensor, seen: Tensor, stride: float
) -> Tensor:
    """IoU [n, m] of masks with objects.

    Near the box by points of the picture's own resolution, of which a small object fills few cells
    of the mask; farther away, where there is nothing of the object, by the mask's cells.

    Args:
        logits: [n, m, h, w].
        places: [n, points, 2] in -1..1, the near ones first.
        labels: [n, points].
        boxes: tight ones [n, 4] in pixels of the square.
        seen: [n, h, w], 1 where the square is not padding.
        stride: pixels a cell.
    """
    predicted = at_places(logits, places[:, :NEAR_POINTS]) > 0
    true = labels[:, None, :NEAR_POINTS] > 0.5
    inside = near_box(boxes, logits.shape[-1], stride)
    area = (inside * seen).flatten(1).sum(1, keepdim=True).clamp(min=1)
    away = (logits > 0) & (seen * (1 - inside) > 0)[:, None]
    both = (predicted & true).float().mean(-1) * area
    either = (predicted | true).float().mean(-1) * area + away.flatten(2).sum(-1)
    return both / either.clamp(min=_LEAST)
