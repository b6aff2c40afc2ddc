"""Automatic masks: seconds and peak memory of ours against the segment-anything package.

    python benchmarks/everything.py [--name vit_b] [--points 16] [--picture 1536 2048]
                                     [--device cpu]

Both find masks in one picture of noise with the same random weights, every mask kept until
suppression, each in a process of its own. "Above weights" is the peak less what the process held
before the picture, in MiB.

    python benchmarks/everything.py --images DIR --annotations FILE [--limit 40]

compares the plain grid with hierarchical ones on the pictures of a data set instead, with one
float, quantized or exported model (`--name`, `--checkpoint`), under thresholds that suit it and
`--options`: the ways take turns on each picture. Recall is the share of annotated objects that one
of the masks fits with an IoU of 0.5 or more.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from devices import add_device, finish, peak_mib
from sam_memory import ALLOCATORS, resident_mib

from ptq4sam.allocator import keep_freed_memory

if TYPE_CHECKING:
    from ptq4sam.everything import EverythingSettings
    from ptq4sam.sam.model import PromptableModel

MODELS = ("ptq4sam", "segment-anything")

_RELATIVE, _THRESHOLD = "hierarchical.relative=true", "hierarchical.high_score_thresh"
# Above any share of the highest logit: no point is left out.
_ALL = (_RELATIVE, f"{_THRESHOLD}=1")
WAYS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "plain, fewer duplicates removed": ("box_nms_thresh=0.85",),
    "published points": ("hierarchical.grid=published",),
    "two rounds": ("hierarchical.grid=plain",),
    "two rounds, relative": (_RELATIVE, f"{_THRESHOLD}=0.9"),
    "two rounds, relative to 0.7": (_RELATIVE, f"{_THRESHOLD}=0.7"),
    **{
        f"relative to {share}, fewer duplicates removed": (
            _RELATIVE,
            f"{_THRESHOLD}={share}",
            "box_nms_thresh=0.85",
        )
        for share in (0.6, 0.55, 0.5)
    },
    "batches, relative": (_RELATIVE, f"{_THRESHOLD}=0.9", "hierarchical.batch=64"),
    "batches until two find nothing": (
        *(_RELATIVE, f"{_THRESHOLD}=0.9"),
        *("hierarchical.batch=64", "hierarchical.patience=2"),
    ),
    "half of the points, spread": (*_ALL, "hierarchical.share=0.5", "box_nms_thresh=0.8"),
    "35 % of the points, spread": (*_ALL, "hierarchical.share=0.35", "box_nms_thresh=0.85"),
}
"""Settings of a way, by the name of a row; with any of the hierarchical mode it is on."""


@dataclass
class Row:
    """What one way found on all pictures so far."""

    seconds: list[float] = field(default_factory=list)
    points: int = 0
    calls: int = 0
    masks: int = 0
    best: list[float] = field(default_factory=list)


def compare(
    sam: PromptableModel,
    images: Path,
    annotations: Path,
    limit: int,
    options: Sequence[str],
    ways: Sequence[str] = tuple(WAYS),
) -> dict[str, Row]:
    """Find masks in each picture by each way, in turns."""
    from ptq4sam.data import CocoDataset
    from ptq4sam.data.segmentation import encode_masks
    from ptq4sam.evaluation.overlap import best_ious
    from ptq4sam.everything import EverythingSettings, Hierarchical, MaskGenerator
    from ptq4sam.sam.predictor import Predictor

    plain = EverythingSettings.suited_to(sam.name).with_overrides(*options)
    staged = replace(plain, hierarchical=Hierarchical())
    settings: dict[str, EverythingSettings] = {
        name: (staged if any(map(_is_hierarchical, way)) else plain).with_overrides(*way)
        for name, way in WAYS.items()
        if name in ways
    }
    rows = {name: Row() for name in settings}
    dataset = CocoDataset(images, annotations)
    predictor = Predictor(sam)
    for number, record in enumerate(dataset.annotated_images()[:limit]):
        image = dataset.load(record)
        objects = encode_masks(np.stack([one.mask for one in dataset.instances(record)]))
        names = list(settings)
        # No way is always the first on a picture.
        for name in names[number % len(names) :] + names[: number % len(names)]:
            generator, row = MaskGenerator(predictor, settings[name]), rows[name]
            with counted_decodes(sam) as calls:
                started = time.perf_counter()
                found = generator.generate(image)
                row.seconds.append(time.perf_counter() - started)
            row.points += generator.tally.points
            row.calls += calls[0]
            row.masks += len(found)
            row.best += best_ious(objects, found.segmentations).tolist()
    return rows


def _is_hierarchical(option: str) -> bool:
    return option.startswith("hierarchical.")


@contextlib.contextmanager
def counted_decodes(sam: PromptableModel) -> Iterator[list[int]]:
    """A list of one number, which grows with each call of the decoder."""
    decode, calls = sam.decode, [0]

    def counting(*arguments: Any) -> Any:
        calls[0] += 1
        return decode(*arguments)

    sam.decode = counting  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        sam.decode = decode  # type: ignore[method-assign]


def open_model(name: str | None, checkpoint: Path | None, device: str) -> PromptableModel:
    """The model whose ways are compared."""
    from ptq4sam.deploy.backends import choose_backend
    from ptq4sam.runs import models

    checkpoint, backend = choose_backend(checkpoint, None)
    return models.open_model(name, checkpoint, torch.device(device), backend)


def write_comparison(rows: dict[str, Row]) -> None:
    """The table of `compare`, shares of the plain way beside it."""
    write, plain = sys.stdout.write, rows["plain"]
    write(
        "| points | s a picture | of plain | points a picture | decoder calls | masks | recall | "
    )
    write("mean best IoU |\n|---|---|---|---|---|---|---|---|\n")
    for name, row in rows.items():
        pictures = len(row.seconds)
        recall = np.mean(np.array(row.best) >= 0.5)
        write(f"| {name} | {np.mean(row.seconds):.2f} | ")
        write(f"{sum(row.seconds) / sum(plain.seconds):.3f} | {row.points / pictures:.0f} | ")
        write(f"{row.calls / pictures:.1f} | {row.masks / pictures:.1f} | {recall:.4f} | ")
        write(f"{np.mean(row.best):.4f} |\n")
    write(f"{len(plain.seconds)} pictures, {len(plain.best)} objects, ")
    write(f"{torch.get_num_threads()} thread(s)\n")


def measure(
    model: str, name: str, points: int, size: tuple[int, int], device: str
) -> dict[str, float]:
    """Find masks with one of the two in this process."""
    from ptq4sam.everything import EverythingSettings, MaskGenerator
    from ptq4sam.families import build_sam
    from ptq4sam.sam.predictor import Predictor

    torch.manual_seed(0)
    sam = build_sam(name).to(device)
    options = {"points_per_side": points, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    if model == "ptq4sam":
        generator = MaskGenerator(Predictor(sam), EverythingSettings(**options))  # type: ignore[arg-type]
        generate = generator.generate
    else:
        from segment_anything import SamAutomaticMaskGenerator, sam_model_registry

        reference = sam_model_registry[name]()
        reference.load_state_dict(sam.state_dict())
        del sam
        generate = SamAutomaticMaskGenerator(
            reference.eval().to(device), **options, output_mode="uncompressed_rle"
        ).generate
    before = resident_mib() if device == "cpu" else peak_mib(device)
    started = time.perf_counter()
    found = generate(image)
    finish(device)
    seconds = time.perf_counter() - started
    peak = peak_mib(device)
    return {"masks": len(found), "seconds": seconds, "peak": peak, "above": peak - before}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", help="of the SAM: vit_b, or on a data set the checkpoint's own")
    parser.add_argument("--points", type=int, default=16, help="points a side")
    parser.add_argument("--picture", type=int, nargs=2, default=(1536, 2048), metavar=("H", "W"))
    parser.add_argument("--model", choices=MODELS, help="measure this one alone, as JSON")
    parser.add_argument("--images", type=Path, help="compare ways on these pictures")
    parser.add_argument("--annotations", type=Path, help="of these objects")
    parser.add_argument("--limit", type=int, default=40, help="pictures")
    parser.add_argument("--checkpoint", type=Path, help="of the model whose ways are compared")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="of each way")
    parser.add_argument(
        "--ways", nargs="+", default=list(WAYS), choices=list(WAYS), help="besides the plain one"
    )
    add_device(parser)
    given = parser.parse_args()
    if (given.images is None) != (given.annotations is None):
        parser.error("--images and --annotations go together")
    write = sys.stdout.write
    if given.images:
        keep_freed_memory()
        sam = open_model(given.name, given.checkpoint, given.device)
        ways = ["plain", *given.ways]
        write_comparison(
            compare(sam, given.images, given.annotations, given.limit, given.options, ways)
        )
        return
    if given.model:
        size = tuple(given.picture)
        found = measure(given.model, given.name or "vit_b", given.points, size, given.device)
        write(json.dumps(found))
        return
    write("| generator | masks | seconds | peak MiB | above weights MiB |\n|---|---|---|---|---|\n")
    rows = []
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    for model in MODELS:
        command = [sys.executable, __file__, "--model", model, *sys.argv[1:]]
        done = subprocess.run(
            command,
            env=os.environ | ALLOCATORS["tuned"] | {"PYTHONPATH": path},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        rows.append(json.loads(done.stdout))
        row = rows[-1]
        write(f"| {model} | {row['masks']} | {row['seconds']:.1f} | {row['peak']:.0f} | ")
        write(f"{row['above']:.0f} |\n")
    ratios = (rows[0][key] / rows[1][key] for key in ("seconds", "peak", "above"))
    write("| ratio | | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |\n")


if __name__ == "__main__":
    main()
