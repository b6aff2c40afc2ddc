"""Time and memory of a whole run with a SAM of random weights: calibrate, freeze, audit, evaluate.

    python benchmarks/random_sam.py --model vit_b --scheme exp/ptq4sam-s44.yaml

The masks mean nothing; seconds and bytes are those of a real model. Scenes stand in for pictures.
`--output FILE.safetensors` keeps the quantized model, e.g. for `ptq4sam verify`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

# Before torch, which then knows how its threads wait.
from ptq4sam.cli import main as ptq4sam

# isort: split
import torch

from ptq4sam.data.scenes import write_scenes
from ptq4sam.families import build_sam

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
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        phases = run(arguments, Path(folder))
    lines = [f"{'phase':<20}{'seconds':>10}{'peak GiB':>10}"]
    for name, took in phases.items():
        peak = took["peak_memory_bytes"] / 2**30
        lines.append(f"{name:<20}{took['seconds']:10.1f}{peak:10.2f}")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
