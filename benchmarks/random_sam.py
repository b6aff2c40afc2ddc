"""Time and memory of a whole run with a SAM of random weights: calibrate, freeze, audit, evaluate.

    python benchmarks/random_sam.py --model vit_b --scheme exp/ptq4sam-s44.yaml

The masks mean nothing; seconds and bytes are those of a real model. Scenes stand in for pictures.
`--output FILE.safetensors` keeps the quantized model, e.g. for `ptq4sam verify`; with `--formats
onnx openvino` it is exported too, and both masks of the first picture's boxes are compared.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Before torch, which then knows how its threads wait.
from ptq4sam.cli import main as ptq4sam

# isort: split
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ptq4sam.data import CocoDataset
from ptq4sam.data.scenes import write_scenes
from ptq4sam.deploy.export import export
from ptq4sam.deploy.exported import open_exported
from ptq4sam.deploy.manifest import Format
from ptq4sam.deploy.storage import load
from ptq4sam.families import build_sam
from ptq4sam.sam.model import PromptableModel
from ptq4sam.sam.predictor import Predictor

RUNTIMES: dict[Format, str] = {"onnx": "onnxruntime", "openvino": "openvino"}
_SCHEME = Path(__file__).resolve().parents[1] / "exp" / "ptq4sam-s44.yaml"


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """The phases of the run, as metrics.json has them.

    Raises:
        RuntimeError: the run failed; it said why.
    """
    torch.manual_seed(0)
    checkpoint = folder / "random.pth"
    torch.save(build_sam(arguments.model).state_dict(), checkpoint)
    train = write_scenes(folder, arguments.calibration, 0, "train")
    val = write_scenes(folder, arguments.pictures, 1, "val")
    command = ["evaluate"]
    if arguments.output is not None:
        command = ["quantize", "--output", str(arguments.output)]
    command += ["--model", arguments.model, "--checkpoint", str(checkpoint)]
    command += ["--scheme", str(arguments.scheme), "--work-dir", str(folder / "run")]
    command += ["--images", str(val[0]), "--annotations", str(val[1])]
    command += ["--calibration-images", str(train[0]), "--calibration-annotations", str(train[1])]
    command += ["--calibration-size", str(arguments.calibration)]
    if arguments.scheme_options:
        command += ["--scheme-options", *arguments.scheme_options]
    if arguments.device:
        command += ["--device", arguments.device]
    if ptq4sam(command):
        raise RuntimeError("the run failed: see the line above")
    phases: dict[str, dict[str, float]] = json.loads((folder / "run/metrics.json").read_text())[
        "phases"
    ]
    return phases


def compared(file: Path, formats: Sequence[Format], folder: Path) -> list[str]:
    """A line for each format: how exported masks differ from simulated ones, and seconds."""
    simulation = load(file)
    data = CocoDataset(*write_scenes(folder, 1, 1, "compared"))
    picture = data.annotated_images()[0]
    image = data.load(picture)
    boxes = np.stack([one.box for one in data.instances(picture)])
    expected, encoding = _logits(simulation, image, boxes)
    lines = [f"simulation: picture encoded in {encoding:.1f} s"]
    for name in formats:
        started = time.perf_counter()
        export(simulation, folder / name, name)
        exporting = time.perf_counter() - started
        found, encoding = _logits(open_exported(folder / name, RUNTIMES[name]), image, boxes)
        both, either = ((found > 0) & (expected > 0)).sum(), ((found > 0) | (expected > 0)).sum()
        lines.append(
            f"{name}: exported in {exporting:.0f} s, picture encoded in {encoding:.1f} s; masks of "
            f"{len(boxes)} boxes: IoU with simulation {float(both / either.clamp(min=1)):.6f}, "
            f"largest difference of logits {float((found - expected).abs().max()):.2e} of "
            f"{float(expected.abs().max()):.2e}"
        )
    return lines


def _logits(sam: PromptableModel, image: NDArray[np.uint8], boxes: ArrayLike) -> tuple[Any, float]:
    predictor = Predictor(sam)
    started = time.perf_counter()
    embedding = predictor.embed(image)
    seconds = time.perf_counter() - started
    return predictor.predict(boxes=boxes, embedding=embedding).low_res, seconds


def main() -> None:
    """Run and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="vit_b")
    parser.add_argument("--scheme", type=Path, default=_SCHEME)
    parser.add_argument("--scheme-options", nargs="+", metavar="KEY=VALUE")
    parser.add_argument("--calibration", type=int, default=2, help="calibration pictures")
    parser.add_argument("--pictures", type=int, default=2, help="evaluated pictures")
    parser.add_argument("--device")
    parser.add_argument("--output", type=Path, help="keep the quantized model")
    parser.add_argument("--formats", nargs="+", default=[], choices=list(RUNTIMES))
    arguments = parser.parse_args()
    if arguments.formats and arguments.output is None:
        parser.error("--formats needs --output: what is exported is the file")
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        phases = run(arguments, Path(folder))
        if arguments.formats:
            lines = compared(arguments.output, arguments.formats, Path(folder))
    lines += [f"{'phase':<20}{'seconds':>10}{'peak GiB':>10}"]
    for name, took in phases.items():
        peak = took["peak_memory_bytes"] / 2**30
        lines.append(f"{name:<20}{took['seconds']:10.1f}{peak:10.2f}")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
