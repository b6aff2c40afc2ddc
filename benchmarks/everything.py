"""Automatic masks: seconds and peak memory of ours against the segment-anything package.

    python benchmarks/everything.py [--name vit_b] [--points 16] [--picture 1536 2048]

Both find masks in one picture of noise with the same random weights, every mask kept until
suppression, each in a process of its own. "Above weights" is the peak less what the process held
before the picture, in MiB.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from sam_memory import ALLOCATORS, resident_mib

MODELS = ("ptq4sam", "segment-anything")


def measure(model: str, name: str, points: int, size: tuple[int, int]) -> dict[str, float]:
    """Find masks with one of the two in this process."""
    from ptq4sam.everything import EverythingSettings, MaskGenerator
    from ptq4sam.families import build_sam
    from ptq4sam.sam.predictor import Predictor

    torch.manual_seed(0)
    sam = build_sam(name)
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
            reference.eval(), **options, output_mode="uncompressed_rle"
        ).generate
    before = resident_mib()
    started = time.perf_counter()
    found = generate(image)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {"masks": len(found), "seconds": seconds, "peak": peak, "above": peak - before}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="vit_b", choices=("vit_b", "vit_l", "vit_h"))
    parser.add_argument("--points", type=int, default=16, help="points a side")
    parser.add_argument("--picture", type=int, nargs=2, default=(1536, 2048), metavar=("H", "W"))
    parser.add_argument("--model", choices=MODELS, help="measure this one alone, as JSON")
    given = parser.parse_args()
    write = sys.stdout.write
    if given.model:
        found = measure(given.model, given.name, given.points, tuple(given.picture))
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
