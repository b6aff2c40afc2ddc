"""Time of a step of joint units (JCAR), as a ratio to the units that they join.

    python benchmarks/joint_units.py [--pictures 2] [--steps 30]

vit_nano's decoder at W4A4 on generated scenes: both cross attentions of a block and the MLP between
them learn one after the other, or together. Times are those of the process, medians over steps.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

# Before torch, which then knows how its threads wait.
from ptq4sam.allocator import keep_freed_memory

# isort: split
from ptq4sam import CocoDataset, load_sam, quantize
from ptq4sam.data.scenes import write_scenes
from ptq4sam.quantization.scheme import Scheme

T = TypeVar("T")

_RECONSTRUCTING = "reconstructing mask_decoder.transformer."
_BLOCKS = ("layers.0", "layers.1")
_APART = ("cross_attn_token_to_image", "mlp", "cross_attn_image_to_token")
_JOINT = ("cross_attentions",)


class StepTimes:
    """A progress that keeps the processor seconds of each unit's steps."""

    def __init__(self) -> None:
        self.by_unit: dict[str, list[float]] = {}

    def __call__(self, steps: Sequence[T], description: str) -> Iterable[T]:
        """The steps themselves."""
        if not description.startswith(_RECONSTRUCTING):
            return steps
        return self._timed(steps, description.removeprefix(_RECONSTRUCTING))

    def _timed(self, steps: Sequence[T], unit: str) -> Iterator[T]:
        seconds = self.by_unit.setdefault(unit, [])
        for step in steps:
            started = time.process_time()
            yield step
            seconds.append(time.process_time() - started)

    def step(self, block: str, units: Sequence[str]) -> float:
        """Seconds of one step of each of a block's units."""
        return sum(statistics.median(self.by_unit[f"{block}.{unit}"][1:]) for unit in units)


def times(data: CocoDataset, granularity: str, pictures: int, steps: int) -> StepTimes:
    """Reconstruct the decoder."""
    scheme = Scheme.from_yaml("ptq4sam-l44").with_steps(steps)
    changed = scheme.with_overrides(f"recon.granularity={granularity}", f"calibrate={pictures}")
    taken = StepTimes()
    quantize(load_sam("vit_nano"), data, changed, quantize_encoder=False, progress=taken)
    return taken


def main() -> None:
    """Print a row for each block."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pictures", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        data = CocoDataset(*write_scenes(Path(folder), arguments.pictures, 0, "train"))
        apart, joint = (
            times(data, granularity, arguments.pictures, arguments.steps)
            for granularity in ("unit", "joint")
        )
    sys.stdout.write("| block | apart, ms | joint, ms | ratio |\n|---|---|---|---|\n")
    for block in _BLOCKS:
        alone, together = apart.step(block, _APART), joint.step(block, _JOINT)
        sys.stdout.write(
            f"| {block} | {1e3 * alone:.1f} | {1e3 * together:.1f} | {together / alone:.2f} |\n"
        )


if __name__ == "__main__":
    main()
