"""What a teacher is worth to a student, and fine-tuning with quantizers against reconstruction.

    python benchmarks/distillation.py --data DIR [--steps 400] [--tuning 100] [--iters 100]
                                      [--rate 1e-4] [--calibrate 32] [--pictures 60]
                                      [--only students quantized]

Students of half of vit_nano's width begin alike (the teacher's prompt encoder and mask decoder, the
same random encoder), see the same views and make the same number of steps at the same rates: only
the terms of the loss differ. With the teacher, embeddings come first, then all terms; on masks
alone there are the terms of the truth throughout.

vit_nano at W4A4 is calibrated on the same pictures: PTQ4SAM-S, which then is fine-tuned with its
quantizers on the training pictures, and PTQ4SAM-L, which is reconstructed on those of calibration.

`--data` has coco_mini, coco_more and photos; without it pictures are generated scenes. Nothing is
trained on the pictures that score, with annotated boxes: coco_mini's val. Everything is kept in
`--work-dir`: a killed benchmark goes on by the same command.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before torch, which then knows how its threads wait.
from ptq4sam.allocator import keep_freed_memory

# isort: split
import numpy as np

from ptq4sam import CocoDataset, load, load_sam
from ptq4sam.data.scenes import write_scenes
from ptq4sam.distillation.settings import (
    DistillationSettings,
    Phase,
    Sampling,
    Source,
    Terms,
)
from ptq4sam.errors import ConfigError
from ptq4sam.evaluation import write_json
from ptq4sam.evaluation.bootstrap import paired_difference
from ptq4sam.evaluation.evaluate import Picture, evaluate_sam
from ptq4sam.evaluation.prompting import Prompting
from ptq4sam.files import read_json
from ptq4sam.progress import bars
from ptq4sam.prompts import GroundTruth
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.runs.distilling import DistillationRequest, distil
from ptq4sam.runs.run import Run
from ptq4sam.runs.settings import DataSettings, RunSettings
from ptq4sam.sam.model import Sam

TEACHER, STUDENT = "vit_nano", "vit_nano:embed_dim=80"
TRUTH = Terms(embedding=0, token=0, mask=0)
EMBEDDINGS = Terms(token=0, mask=0, focal=0, dice=0, iou=0)
SAMPLING = Sampling(boxes=1.0, rounds=0)
"""Asked as the pictures that score are: by boxes."""
FLOAT, TAUGHT, ALONE = "vit_nano", "half the width, with the teacher", "half the width, masks alone"
PLAIN, TUNED = "W4A4, PTQ4SAM-S", "W4A4, PTQ4SAM-S, fine-tuned"
LEARNED = "W4A4, PTQ4SAM-L, reconstructed"
GROUPS = {"students": (FLOAT, TAUGHT, ALONE), "quantized": (FLOAT, LEARNED, TUNED, PLAIN)}
COUNTS = ("steps", "tuning", "iters", "calibrate", "batch", "rate")
"""Flags that are numbers of the work."""
PAIRS = {"students": ((TAUGHT, ALONE),), "quantized": ((TUNED, LEARNED), (TUNED, PLAIN))}


@dataclass(frozen=True)
class Work:
    """What is asked of the benchmark, and where it is kept.

    Attributes:
        folder: receives work directories, weights and scores.
        sources: photographs to train on, the calibration pictures in the first; empty for scenes.
        calibration: pictures that ranges come from, and that are reconstructed on.
        val: pictures that score.
        steps: of each student.
        tuning: steps of the fine-tuning.
        iters: of the reconstruction of each unit.
        calibrate: calibration pictures.
        batch: views of a step.
        rate: of the fine-tuning.
    """

    folder: Path
    sources: tuple[Source, ...]
    calibration: DataSettings
    val: CocoDataset
    steps: int
    tuning: int
    iters: int
    calibrate: int
    batch: int
    rate: float

    def student(self, name: str, first: Terms, then: Terms) -> Path:
        """Train a student; three quarters of the steps are of the first phase."""
        early = self.steps * 3 // 4
        phases = (
            Phase(early, self.batch, 1e-3, 1e-4, early // 10, first),
            Phase(self.steps - early, self.batch, 3e-4, 5e-6, early // 40, then),
        )
        settings = DistillationSettings(
            student=STUDENT, teacher=TEACHER, data=self.sources, sampling=SAMPLING, phases=phases
        )
        return self._distil(name, settings)

    def tuned(self, name: str) -> Path:
        """Fine-tune a quantized model."""
        phase = Phase(self.tuning, self.batch, self.rate, self.rate / 100, self.tuning // 10)
        settings = DistillationSettings(
            student=TEACHER, data=self.sources, sampling=SAMPLING, phases=(phase,)
        )
        return self._distil(name, settings, self._scheme("ptq4sam-s44"))

    def quantized(self, name: str, *scheme: str) -> Path:
        """Quantize after training, by a scheme and what is changed of it."""
        output = self._file(name)
        if not output.exists():
            settings = RunSettings(
                TEACHER,
                None,
                "ground-truth",
                output.with_suffix(""),
                scheme=self._scheme(*scheme),
                calibration=self.calibration,
                save_model=output,
                resume=True,
                device="cpu",
            )
            Run(settings, bars).execute()
        return output

    def _distil(
        self, name: str, settings: DistillationSettings, scheme: Scheme | None = None
    ) -> Path:
        output = self._file(name)
        if not output.exists():
            request = DistillationRequest(
                settings,
                output,
                output.with_suffix(""),
                scheme=scheme,
                calibration=None if scheme is None else self.calibration,
                resume=True,
                device="cpu",
            )
            distil(request, bars)
        return output

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _scheme(self, name: str, *changes: str) -> Scheme:
        return Scheme.from_yaml(name).with_overrides(f"calibrate={self.calibrate}", *changes)

    def models(self) -> dict[str, Callable[[], Sam]]:
        """What makes each model, by the title of its row."""
        iters = f"recon.iters={self.iters}"
        return {
            FLOAT: lambda: load_sam(TEACHER),
            TAUGHT: lambda: load_sam(STUDENT, self.student("taught", EMBEDDINGS, Terms())),
            ALONE: lambda: load_sam(STUDENT, self.student("alone", TRUTH, TRUTH)),
            PLAIN: lambda: load(self.quantized("plain", "ptq4sam-s44")),
            TUNED: lambda: load(self.tuned("tuned")),
            LEARNED: lambda: load(self.quantized("learned", "ptq4sam-l44", iters)),
        }

    def scores(self, title: str, make: Callable[[], Sam]) -> list[list[float]]:
        """IoU of each object with annotated boxes, by picture; from disk where it was scored."""
        path = self.folder / "scores.json"
        kept: dict[str, Any] = read_json(path, "scores")[0] if path.exists() else {}
        if title not in kept:
            kept[title] = scored(make(), self.val)
            write_json(kept, path)
        found: list[list[float]] = kept[title]
        return found


def scored(sam: Sam, val: CocoDataset) -> list[list[float]]:
    """IoU of each object with annotated boxes, by picture."""
    found: list[list[float]] = []

    def note(picture: Picture) -> None:
        if len(picture.ious):
            found.append([float(value) for value in picture.ious])

    source = GroundTruth(val)
    evaluate_sam(sam, val, source, Prompting(), progress=bars, on_picture=note, score=True)
    return found


def lines(group: str, found: dict[str, list[list[float]]]) -> list[str]:
    """A table of means, then the differences between pairs of its rows."""
    told = ["| model | mean IoU (%) |", "|---|---|"]
    for title in GROUPS[group]:
        told.append(f"| {title} | {100 * np.mean(np.concatenate(found[title])):.1f} |")
    for first, second in PAIRS[group]:
        means, others = ([float(np.mean(one)) for one in found[x]] for x in (first, second))
        counts = [len(one) for one in found[first]]
        told.append(f"\n{first}, less {second}: {paired_difference(means, others, counts)}")
    return told


def opened(arguments: argparse.Namespace) -> Work:
    """The pictures and the folder.

    Raises:
        ConfigError: the folder is of other settings.
    """
    folder: Path = arguments.work_dir
    said = {k: str(v) for k, v in vars(arguments).items() if k not in ("work_dir", "only")}
    path = folder / "asked.json"
    if path.exists() and (there := read_json(path, "settings")[0]) != said:
        different = ", ".join(k for k in said if there.get(k) != said[k])
        raise ConfigError(f"{folder} was begun with other {different}: name another --work-dir")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(said, path)
    data: Path | None = arguments.data
    if data is None:
        train, val = (write_scenes(folder / "scenes", 32, 0, part) for part in ("train", "val"))
        sources: tuple[Source, ...] = ()
    else:
        mini, more, photos = (data / name for name in ("coco_mini", "coco_more", "photos"))
        train = (mini / "images/train2017", mini / "annotations/instances_train.json")
        val = (mini / "images/val2017", mini / "annotations/instances_val.json")
        sources = (
            Source(*train, weight=2.5),
            Source(more / "images", more / "annotations/instances_more.json", weight=2.0),
            Source(photos / "images", photos / "annotations/instances_photos.json", weight=0.5),
        )
    chosen = CocoDataset(*val)
    chosen.images = chosen.annotated_images()[: arguments.pictures]
    counts = (getattr(arguments, name) for name in COUNTS)
    return Work(folder, sources, DataSettings(*train), chosen, *counts)


def main(given: Sequence[str] | None = None) -> int:
    """Train, score and print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, metavar="DIR", help="of photographs; default: scenes")
    parser.add_argument("--steps", type=int, default=400, help="of each student")
    parser.add_argument("--tuning", type=int, default=100, help="steps of the fine-tuning")
    parser.add_argument("--iters", type=int, default=100, help="of the reconstruction, a unit")
    parser.add_argument("--calibrate", type=int, default=32, help="calibration pictures")
    parser.add_argument("--batch", type=int, default=2, help="views of a step")
    parser.add_argument("--rate", type=float, default=1e-4, help="of the fine-tuning")
    parser.add_argument("--pictures", type=int, default=60, help="that score")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/distillation"))
    arguments = parser.parse_args(given)
    keep_freed_memory()
    work = opened(arguments)
    models = work.models()
    for group in arguments.only:
        found = {title: work.scores(title, models[title]) for title in GROUPS[group]}
        sys.stdout.write("\n".join(lines(group, found)) + "\n\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
