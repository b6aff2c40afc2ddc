"""What pages of docs/ are measured on: data sets, and the machine."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from ptq4sam.data.scenes import write_scenes


@dataclass(frozen=True)
class Data:
    """A data set with pictures to calibrate on."""

    name: str
    images: Path
    annotations: Path
    calibration_images: Path
    calibration_annotations: Path


def data_sets(work_dir: Path, coco_mini: Path | None) -> list[Data]:
    """Generated scenes, which are written first, and coco_mini where its folder is given."""
    scenes = work_dir / "scenes"
    train, val = write_scenes(scenes, 32, 0, "train"), write_scenes(scenes, 100, 1, "val")
    found = [Data("generated scenes", *val, *train)]
    if coco_mini is not None:
        images, notes = coco_mini / "images", coco_mini / "annotations"
        found.append(
            Data(
                "coco_mini val",
                images / "val2017",
                notes / "instances_val.json",
                images / "train2017",
                notes / "instances_train.json",
            )
        )
    return found


def machine() -> str:
    """Number of cores and kind of processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor()}"
