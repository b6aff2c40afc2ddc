"""Time of quantizing vit_nano with each method, as a ratio to PTQ4SAM-S's.

    python benchmarks/methods.py [--pictures 4] [--only NAME ...]

The trials are those of exp/sweeps/methods.yaml, on generated scenes. Times are those of the
process, so that other programs on the machine count little.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

# Before torch, which then knows how its threads wait.
from ptq4sam.allocator import keep_freed_memory

# isort: split
from ptq4sam import CocoDataset, load_sam, quantize
from ptq4sam.data.scenes import write_scenes
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam
from ptq4sam.sweep.grid import read_sweep

_AXIS, _BASE = "added", "nothing"


def seconds(sam: Sam, data: CocoDataset, scheme: Scheme) -> float:
    """Processor seconds of a quantization."""
    started = time.process_time()
    quantize(sam, data, scheme)
    return time.process_time() - started


def main() -> None:
    """Print a row for each method."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--only", nargs="*", default=[], help="trials by name; default: all")
    arguments = parser.parse_args()
    keep_freed_memory()
    sweep = read_sweep(Path("methods"))
    trials = {str(trial.values[_AXIS]): trial.settings.scheme for trial in sweep.trials}
    chosen = [_BASE, *(arguments.only or [name for name in trials if name != _BASE])]
    sam = load_sam("vit_nano")
    with tempfile.TemporaryDirectory() as folder:
        data = CocoDataset(*write_scenes(Path(folder), arguments.pictures, 0, "train"))
        few = {name: replace(trials[name], calibrate=arguments.pictures) for name in chosen}
        # Kernels are compiled where they pay, once.
        quantize(sam, data, few[_BASE])
        taken = {name: seconds(sam, data, scheme) for name, scheme in few.items()}
    sys.stdout.write("| added to PTQ4SAM-S | seconds | ratio |\n|---|---|---|\n")
    for name, spent in taken.items():
        sys.stdout.write(f"| {name} | {spent:.1f} | {spent / taken[_BASE]:.2f} |\n")


if __name__ == "__main__":
    main()
