"""Corrections of weights and outputs on the pictures that they were made of, and on others.

    python benchmarks/corrections.py --images DIR --annotations FILE [--calibration 8]
        [--pictures 20] [--only mac aqer qwt-v2]

The first pictures with objects calibrate, the ones behind them are the others. Of each method, on
top of PTQ4SAM-S at 4 bits: how much the squared errors of the decoder's attentions change, each
attention on what the float model gives it, and what becomes of masks.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

# Before torch, which then knows how its threads wait.
from ptq4sam.allocator import keep_freed_memory

# isort: split
import torch
from torch import Tensor, nn

from ptq4sam import CocoDataset, evaluate, load_sam, quantize
from ptq4sam.evaluation.prompting import Prompting
from ptq4sam.model.calibration import CalibrationItem, run_item
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.prompts import GroundTruth
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.runs.calibration import calibration_pictures
from ptq4sam.sam.model import Sam

METHODS = ("mac", "aqer", "qwt-v2")


def part(data: CocoDataset, first: int, last: int) -> CocoDataset:
    """Pictures with objects from one place to another."""
    some = copy.copy(data)
    some.images = data.annotated_images()[first:last]
    return some


def items_of(sam: Sam, data: CocoDataset) -> Sequence[CalibrationItem]:
    """A data set as calibration takes it."""
    return calibration_pictures(sam, data, GroundTruth(data), len(data.images), Prompting())


@torch.no_grad()
def attention_errors(
    sam: Sam, models: dict[str, QuantizedSam], items: Sequence[CalibrationItem]
) -> dict[str, dict[str, float]]:
    """Squared errors of attentions on the float model's inputs, by path and model."""
    errors: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(models, 0.0))

    def compare(path: str, _owner: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        for name, model in models.items():
            found = model.get_submodule(path)(*inputs)
            errors[path][name] += float((found - output).square().sum())

    first = next(iter(models.values()))
    for path in first.attention_parts():
        sam.get_submodule(path).register_forward_hook(partial(compare, path))
    for item in items:
        run_item(sam, item)
    return errors


def main() -> None:
    """Print a table of the attentions and one of masks."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--annotations", type=Path, required=True)
    parser.add_argument("--calibration", type=int, default=8, help="pictures that calibrate (8)")
    parser.add_argument("--pictures", type=int, default=20, help="others (20)")
    parser.add_argument("--only", nargs="*", default=METHODS, choices=METHODS)
    arguments = parser.parse_args()
    keep_freed_memory()
    sam, data = load_sam("vit_nano"), CocoDataset(arguments.images, arguments.annotations)
    seen = part(data, 0, arguments.calibration)
    others = part(data, arguments.calibration, arguments.calibration + arguments.pictures)
    scheme = Scheme.from_yaml("ptq4sam-s44").with_overrides(f"calibrate={arguments.calibration}")
    write = sys.stdout.write
    exact = [evaluate(sam, pictures)["mean_iou"] for pictures in (seen, others)]
    write(f"| added | {' | '.join(['mean IoU', 'change', 'agreement'] * 2)} |\n")
    write(f"|---|{'---|' * 6}\n")
    models: dict[str, QuantizedSam] = {}
    for name in ("nothing", *arguments.only):
        added = "" if name == "nothing" else name
        models[name] = quantize(sam, seen, scheme.with_overrides(f"methods=[{added}]"))
        columns = []
        for pictures, best in zip((seen, others), exact, strict=True):
            scores = evaluate(models[name], pictures, reference=sam)
            change = 100 * (scores["mean_iou"] - best)
            columns += [f"{scores['mean_iou']:.3f}", f"{change:+.1f}", f"{scores['agreement']:.3f}"]
        write(f"| {name} | {' | '.join(columns)} |\n")
        sys.stdout.flush()
    write(f"\n| attention | {' | '.join(f'{name}: seen | others' for name in arguments.only)} |\n")
    write(f"|---|{'---|---|' * len(arguments.only)}\n")
    both = [attention_errors(copy.deepcopy(sam), models, items_of(sam, p)) for p in (seen, others)]
    for path in both[0]:
        columns = [
            f"{errors[path][name] / errors[path]['nothing']:.2f}"
            for name in arguments.only
            for errors in both
        ]
        write(f"| {path} | {' | '.join(columns)} |\n")


if __name__ == "__main__":
    main()
