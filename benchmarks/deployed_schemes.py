"""What an exported vit_nano takes under one scheme, as a ratio to another, and whether it agrees.

    python benchmarks/deployed_schemes.py [ptq4sam-l44 sam4-l] [--steps 2] [--rounds 15]

Quantized on four generated scenes, reconstructed with few steps, which change values and not
graphs; exported for ONNX Runtime and OpenVINO in their exact form. A picture is encoded and 16
boxes are decoded in turns, so that a busy machine slows all alike. Codes agree where logits of the
masks differ from the simulation's by last bits only.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

# Before torch, which then knows how its threads wait.
from ptq4sam.allocator import keep_freed_memory

# isort: split
import numpy as np
import torch

import ptq4sam
from ptq4sam.data.scenes import write_scenes
from ptq4sam.deploy.backends import open_backend
from ptq4sam.deploy.export import export
from ptq4sam.deploy.manifest import Format
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.predictor import Predictor

_SCENES, _BOXES = 4, 16
RUNTIMES: dict[str, Format] = {"onnxruntime": "onnx", "openvino": "openvino"}


def made(name: str, data: ptq4sam.CocoDataset, steps: int, folder: Path) -> dict[str, Predictor]:
    """The simulation of a scheme and its exports, by runtime."""
    scheme = replace(Scheme.from_yaml(name).with_steps(steps), calibrate=_SCENES)
    quantized = ptq4sam.quantize(ptq4sam.load_sam("vit_nano"), data, scheme)
    found = {"simulation": Predictor(quantized)}
    for runtime, kind in RUNTIMES.items():
        export(quantized, folder / name, kind)
        found[runtime] = Predictor(open_backend(folder / name, runtime))
    return found


def answered(
    predictor: Predictor, image: np.ndarray, boxes: np.ndarray
) -> tuple[float, torch.Tensor]:
    """Seconds of one picture with its boxes, and the logits of its masks."""
    started = time.perf_counter()
    logits = predictor.predict(boxes=boxes, embedding=predictor.embed(image)).low_res
    return time.perf_counter() - started, logits


@torch.no_grad()
def main() -> None:
    """Print a row for each scheme."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("schemes", nargs="*", default=["ptq4sam-l44", "sam4-l"])
    parser.add_argument("--steps", type=int, default=2, help="of reconstruction, a unit")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    keep_freed_memory()
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (256, 256, 3), dtype=np.uint8)
    corners = generator.uniform(0, 128, (_BOXES, 2))
    boxes = np.concatenate([corners, corners + 85], axis=1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = ptq4sam.CocoDataset(*write_scenes(folder, _SCENES, 0, "train"))
        models = {name: made(name, data, arguments.steps, folder) for name in arguments.schemes}
        cells = [(name, kind) for kind in ("simulation", *RUNTIMES) for name in models]
        taken: dict[tuple[str, str], list[float]] = {cell: [] for cell in cells}
        logits = {}
        for _ in range(arguments.rounds + 1):
            for name, kind in cells:
                seconds, logits[name, kind] = answered(models[name][kind], image, boxes)
                taken[name, kind].append(seconds)
    sys.stdout.write("| runs in | scheme | ms | ratio | logits off by |\n|---|---|---|---|---|\n")
    for name, kind in cells:
        first = statistics.median(taken[arguments.schemes[0], kind][1:])
        median = statistics.median(taken[name, kind][1:])
        off = float((logits[name, kind] - logits[name, "simulation"]).abs().max())
        row = (kind, name, f"{1000 * median:.0f}", f"{median / first:.2f}", f"{off:.1e}")
        sys.stdout.write(f"| {' | '.join(row)} |\n")


if __name__ == "__main__":
    main()
