"""Which thresholds suit a model's "everything": what it finds by each pair of them.

    python benchmarks/everything_thresholds.py --images DIR --annotations FILE [--limit 40]
                                               [--name vit_nano] [--most 100]

Masks of the plain grid are found once, with the lowest thresholds, and filtered by each pair. The
table ends with the pair that fits annotated objects best among those that leave at most `--most`
masks a picture, about as many as SAM's own thresholds leave of SAM's masks.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from everything import open_model
from numpy.typing import NDArray

from ptq4sam.data import CocoDataset
from ptq4sam.data.segmentation import encode_masks
from ptq4sam.evaluation.overlap import best_ious
from ptq4sam.everything import EverythingSettings, MaskGenerator
from ptq4sam.everything.filters import without_duplicates
from ptq4sam.everything.masks import FoundMasks
from ptq4sam.sam.predictor import Predictor

PREDICTED = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.88)
STABLE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.95)


@dataclass
class Found:
    """What one pair of thresholds leaves on all pictures so far."""

    masks: list[int] = field(default_factory=list)
    best: list[float] = field(default_factory=list)


def filtered(masks: FoundMasks, predicted: float, stable: float, nms: float) -> NDArray[np.int64]:
    """Places of the masks that stay, without duplicates."""
    places = np.flatnonzero((masks.predicted_ious > predicted) & (masks.stability_scores >= stable))
    kept = without_duplicates(masks.boxes[places], masks.predicted_ious[places], nms)
    return places[kept]


def measure(arguments: argparse.Namespace) -> dict[tuple[float, float], Found]:
    """Filter the masks of each picture by each pair."""
    pairs = list(itertools.product(PREDICTED, STABLE))
    rows = {pair: Found() for pair in pairs}
    nms = EverythingSettings().box_nms_thresh
    low = EverythingSettings(
        points_per_side=arguments.points,
        pred_iou_thresh=min(PREDICTED),
        stability_score_thresh=min(STABLE),
        box_nms_thresh=1.0,
    )
    predictor = Predictor(open_model(arguments.name, arguments.checkpoint, "cpu"))
    dataset = CocoDataset(arguments.images, arguments.annotations)
    for record in dataset.annotated_images()[: arguments.limit]:
        masks = MaskGenerator(predictor, low).generate(dataset.load(record))
        objects = encode_masks(np.stack([one.mask for one in dataset.instances(record)]))
        for pair in pairs:
            chosen = filtered(masks, *pair, nms)
            rows[pair].masks.append(len(chosen))
            left = [masks.segmentations[place] for place in chosen]
            rows[pair].best += best_ious(objects, left).tolist()
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--annotations", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=40, help="pictures")
    parser.add_argument("--points", type=int, default=32, help="points a side")
    parser.add_argument("--most", type=float, default=100, help="masks a picture")
    parser.add_argument("--name", help="of the model")
    parser.add_argument("--checkpoint", type=Path)
    arguments = parser.parse_args()
    rows = measure(arguments)
    write = sys.stdout.write
    write(
        "| pred_iou_thresh | stability_score_thresh | masks a picture | recall | mean best IoU |\n"
    )
    write("|---|---|---|---|---|\n")
    for (predicted, stable), row in rows.items():
        recall = np.mean(np.array(row.best) >= 0.5)
        write(f"| {predicted} | {stable} | {np.mean(row.masks):.1f} | {recall:.4f} | ")
        write(f"{np.mean(row.best):.4f} |\n")
    allowed = [pair for pair, row in rows.items() if np.mean(row.masks) <= arguments.most]
    if allowed:
        predicted, stable = max(allowed, key=lambda pair: float(np.mean(rows[pair].best)))
        write(f"pred_iou_thresh={predicted} stability_score_thresh={stable}\n")


if __name__ == "__main__":
    main()
