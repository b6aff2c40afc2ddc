"""The commands on five generated scenes and a small SAM with random weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ptq4sam.cli import main
from ptq4sam.quantization.scheme import Scheme

REPOSITORY = Path(__file__).resolve().parents[1]
SCHEMES = REPOSITORY / "exp"

# Searches for the best grid of every tensor take most of a short run, and are tested elsewhere.
QUICK = ("w_qconfig.observer=MinMaxObserver", "a_qconfig.observer=AvgMinMaxObserver")

SMALL = (
    "vit_nano:image_size=64,embed_dim=32,depth=2,num_heads=2,global_attn_indexes=[1],window_size=3,"
    "prompt_dim=32,decoder_mlp_dim=32,decoder_heads=2,iou_hidden_dim=16"
)
"""A SAM with a padded window, a global attention and every other part, by a name that new processes
know too."""

AP = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR")


@dataclass(frozen=True)
class Tiny:
    """Two scenes to calibrate on, three to evaluate, and float weights."""

    folder: Path
    checkpoint: Path

    def images(self, split: str = "val") -> Path:
        return self.folder / "images" / split

    def annotations(self, split: str = "val") -> Path:
        return self.folder / "annotations" / f"{split}.json"

    def model(self) -> list[str]:
        return ["--model", SMALL, "--checkpoint", str(self.checkpoint)]

    def data(self) -> list[str]:
        return ["--images", str(self.images()), "--annotations", str(self.annotations())]

    def calibration(self) -> list[str]:
        return [
            *("--calibration-images", str(self.images("train"))),
            *("--calibration-annotations", str(self.annotations("train"))),
            *("--calibration-size", "2"),
        ]

    def scheme(self, name: str, *options: str) -> list[str]:
        given = ["--scheme-options", *QUICK, *options]
        return ["--scheme", str(SCHEMES / f"{name}.yaml"), *given, *self.calibration()]

    def short_scheme(self, name: str, path: Path) -> Path:
        """A scheme of the repository for two pictures and two steps, as a file."""
        scheme = Scheme.from_yaml(SCHEMES / f"{name}.yaml").with_overrides("calibrate=2", *QUICK)
        if scheme.recon is not None:
            scheme = scheme.with_overrides("recon.iters=2")
        path.write_text(scheme.to_yaml())
        return path


@dataclass(frozen=True)
class Quantized:
    """A quantized model in a file, and what the run that wrote it measured."""

    path: Path
    work_dir: Path
    metrics: dict[str, Any]


def run(*arguments: object) -> None:
    """The `ptq4sam` command, which must succeed."""
    assert main([str(argument) for argument in arguments]) == 0


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that the command ends with; of files that lack, their list in one line."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    lines = errors.splitlines()
    (start,) = [n for n, line in enumerate(lines) if line.startswith("error: ")]
    assert start == len(lines) - 1 or lines[start].startswith("error: not there:")
    return " ".join(" ".join(lines[start:]).split())


def read_metrics(work_dir: Path) -> dict[str, Any]:
    """metrics.json, which must be JSON in the strict sense (no NaN)."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    text = (work_dir / "metrics.json").read_text()
    metrics: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return metrics


def numbers(metrics: dict[str, Any]) -> dict[str, Any]:
    """What a run found, without what it was asked and did, and how long it took."""
    others = ("phases", "asked", "changed_by")
    return {key: value for key, value in metrics.items() if key not in others}


def without_times(metrics: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metrics.items() if key != "phases"}
