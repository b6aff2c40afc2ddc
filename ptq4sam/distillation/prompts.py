"""Prompts in rounds, as SAM was trained (Kirillov et al. 2023, app. A) and TinySAM is distilled.

A box or a click first, then clicks where the mask is wrong, each with the mask so far.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ptq4sam.sam.prompt_encoder import PromptEncoder

_COARSE = 4


@dataclass(frozen=True)
class Prompts:
    """What n objects are asked by, in pixels of SAM's input.

    Attributes:
        boxes: [n, 4] xyxy.
        by_box: [n] whether the object is asked by its box; the others are by their first click.
        points: [n, k, 2] clicks; the first one of an object that is asked by its box is not used.
        labels: [n, k], 1 object, 0 background.
    """

    boxes: Tensor
    by_box: Tensor
    points: Tensor
    labels: Tensor

    @classmethod
    def first(
        cls,
        boxes: Tensor,
        target: Tensor,
        stride: float,
        limit: int,
        box_share: float,
        generator: torch.Generator,
    ) -> Prompts:
        """A box or a click for each object.

        Args:
            boxes: tight ones [n, 4], in pixels.
            target: [n, h, w] in 0..1.
            stride: pixels a cell of `target`.
            limit: side of the square that boxes lie in.
            box_share: of the objects that are asked by their boxes.
            generator: on the CPU.
        """
        points, _ = clicks_in(target, stride, generator)
        by_box = torch.rand(len(boxes), generator=generator, device="cpu") < box_share
        return cls(
            jittered(boxes, limit, generator),
            by_box.to(boxes.device),
            points[:, None],
            torch.ones(len(boxes), 1, device=boxes.device),
        )

    def refined(
        self, logits: Tensor, target: Tensor, stride: float, generator: torch.Generator
    ) -> Prompts:
        """One more click each, where masks of logits [n, h, w] differ from `target`."""
        wrong = ((logits > 0) != (target > 0.5)).float()
        nothing = wrong.flatten(1).sum(1) == 0
        wrong = torch.where(nothing[:, None, None], target, wrong)
        points, index = clicks_in(wrong, stride, generator)
        labels = (target.flatten(1).gather(1, index) > 0.5).float()
        return dataclasses.replace(
            self,
            points=torch.cat([self.points, points[:, None]], dim=1),
            labels=torch.cat([self.labels, labels], dim=1),
        )

    def __getitem__(self, chosen: Tensor) -> Prompts:
        return Prompts(
            self.boxes[chosen], self.by_box[chosen], self.points[chosen], self.labels[chosen]
        )

    def moved(self, shift: Tensor) -> Prompts:
        """The same objects elsewhere; `shift` [n, 2] is (x, y) in pixels."""
        return dataclasses.replace(
            self, points=self.points + shift[:, None], boxes=self.boxes + shift.repeat(1, 2)
        )

    @property
    def lone(self) -> Tensor:
        """[n] whether an object is asked by a click alone, which is ambiguous."""
        return ~self.by_box if self.points.shape[1] == 1 else torch.zeros_like(self.by_box)

    def embedded(self, encoder: PromptEncoder) -> Tensor:
        """Tokens [n, k + 1, dim]."""
        by_click: Tensor = encoder(points=(self.points, self.labels))[0]
        later = (self.points[:, 1:], self.labels[:, 1:]) if self.points.shape[1] > 1 else None
        by_box: Tensor = encoder(points=later, boxes=self.boxes)[0]
        return torch.where(self.by_box[:, None, None], by_box, by_click)


def clicks_in(region: Tensor, stride: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A place in each region: anywhere for half of them, else deep inside, where people click.

    Args:
        region: [n, h, w] in 0..1.
        stride: pixels a cell.
        generator: on the CPU.

    Returns:
        [n, 2] (x, y) in pixels, and the index [n, 1] of the cell.
    """
    deep = (region * _depth(region)).flatten(1)
    deep = (deep / deep.amax(1, keepdim=True).clamp(min=1e-6)) ** 12
    anywhere = torch.rand(len(region), 1, generator=generator, device="cpu").to(region.device) < 0.5
    weight = torch.where(anywhere, region.flatten(1), deep) + 1e-9
    index = torch.multinomial(weight.cpu(), 1, generator=generator)
    width = region.shape[-1]
    cell = torch.cat([index % width, index // width], dim=1)
    inside = torch.rand(cell.shape, generator=generator, device="cpu")
    return ((cell + inside) * stride).to(region.device), index.to(region.device)


def _depth(region: Tensor) -> Tensor:
    """How much of the region lies around each cell, near and far; [n, h, w] both."""
    near = [F.avg_pool2d(region[:, None], side, 1, side // 2) for side in (3, 7)]
    coarse = F.avg_pool2d(region[:, None], _COARSE)
    far = [
        F.interpolate(F.avg_pool2d(coarse, side, 1, side // 2), scale_factor=_COARSE)
        for side in (3, 7)
    ]
    return torch.stack([*near, *far]).sum(0)[:, 0]


def jittered(boxes: Tensor, limit: int, generator: torch.Generator) -> Tensor:
    """Half of the boxes stay exact, half move like a detector's (5 % of the side, at most 10)."""
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    normal = torch.randn(boxes.shape, generator=generator, device="cpu").to(boxes.device)
    uniform = torch.rand(boxes.shape, generator=generator, device="cpu").to(boxes.device)
    noise = (0.05 * normal * sides).clamp(-10, 10) + uniform - 0.5
    moves = (torch.rand(len(boxes), 1, generator=generator, device="cpu") < 0.5).to(boxes.device)
    return (boxes + noise * moves).clamp(0, limit)
