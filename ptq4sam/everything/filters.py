"""Which masks stay: stability, boxes at the edge of a crop, duplicates, small regions."""

from __future__ import annotations

import numpy as np
import scipy
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptq4sam.everything.crops import Crop

_EDGE_PIXELS = 20
"""A box that comes so near to the edge of a crop was probably cut off by it."""

_EIGHT_NEIGHBOURS = np.ones((3, 3), np.int8)


def stability(logits: Tensor, offset: float) -> Tensor:
    """How little masks depend on the cut: IoU of those cut at `offset` above and below zero.

    Args:
        logits: [n, height, width].
        offset: of the cut, 0 or more.

    Returns:
        [n] in 0-1; 0 where both masks are empty.
    """
    # The one is within the other, so that their areas are intersection and union.
    high, low = (_areas(logits > cut) for cut in (offset, -offset))
    return high / low.clamp(min=1)


def _areas(masks: Tensor) -> Tensor:
    """Pixels of bool masks [n, height, width]."""
    if masks.device.type != "cpu":
        return masks.flatten(1).sum(dim=1)
    # torch makes a number of 8 bytes of each pixel first: twenty times as long.
    counts = [np.count_nonzero(mask) for mask in masks.numpy()]
    return torch.tensor(counts, dtype=torch.int64, device=masks.device)


def mask_boxes(masks: Tensor) -> Tensor:
    """Boxes [n, 4] xyxy of the outermost pixels of bool masks [n, height, width]; 0 for none."""

    def ends(occupied: Tensor) -> tuple[Tensor, Tensor]:
        last = occupied.shape[1] - 1 - occupied.flip(1).argmax(dim=1)
        return occupied.argmax(dim=1), last

    # The largest byte, not `any` of booleans, which takes ten times as long on a CPU.
    pixels = masks.view(torch.uint8)
    columns, rows = pixels.amax(dim=1), pixels.amax(dim=2)
    (left, right), (top, bottom) = ends(columns), ends(rows)
    boxes = torch.stack([left, top, right, bottom], dim=1)
    return boxes * columns.amax(dim=1)[:, None].long()


def cut_off(boxes: Tensor, crop: Crop, size: tuple[int, int]) -> Tensor:
    """Whether boxes come near an edge of their crop that is not one of the picture: bool [n].

    Args:
        boxes: [n, 4] xyxy in pixels of the picture.
        crop: where they were found.
        size: (height, width) of the picture.
    """
    height, width = size
    of_crop = (boxes - boxes.new_tensor(crop.box)).abs() <= _EDGE_PIXELS
    of_picture = (boxes - boxes.new_tensor([0, 0, width, height])).abs() <= _EDGE_PIXELS
    return (of_crop & ~of_picture).any(dim=1)


def without_duplicates(
    boxes: NDArray[np.int64], scores: NDArray[np.generic], threshold: float
) -> NDArray[np.int64]:
    """Places of the boxes that stay after non-maximum suppression, highest score first.

    Args:
        boxes: [n, 4] xyxy.
        scores: [n].
        threshold: a box whose IoU with a better one is higher goes.
    """
    from torchvision.ops import nms

    corners = torch.from_numpy(boxes).float()
    kept: Tensor = nms(corners, torch.from_numpy(np.asarray(scores, np.float32)), threshold)
    return kept.numpy()


def without_small_regions(mask: NDArray[np.bool_], pixels: int) -> NDArray[np.bool_]:
    """A mask [height, width] with its small holes filled, then its small islands removed.

    Regions are connected over sides and corners. The largest island stays, however small.

    Args:
        mask: bool.
        pixels: regions with fewer go.
    """
    holes, sizes = _regions(~mask)
    filled = mask | np.isin(holes, 1 + np.flatnonzero(sizes < pixels))
    islands, sizes = _regions(filled)
    large = np.flatnonzero(sizes >= pixels)
    if len(sizes) == 0 or len(large) == len(sizes):
        return filled
    return np.isin(islands, 1 + (large if len(large) else sizes.argmax()))


def _regions(mask: NDArray[np.bool_]) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """The connected regions of a mask, numbered from 1, and their sizes in pixels."""
    numbered, count = scipy.ndimage.label(mask, _EIGHT_NEIGHBOURS)
    return numbered, np.bincount(numbered.ravel(), minlength=count + 1)[1:]
