"""Measure small SAMs, float and quantized, and write docs/results.md and the table of README.md.

    python tools/write_results.py --steps 400 --out docs/results.md \
        --coco-mini DIR --yolox yolox_nano.onnx
    python tools/write_results.py --model tiny_vit_nano --statistics-only ...
    python tools/write_results.py --bimodal work_dirs/sweeps/two-peaks/sweep.csv

Each call writes its own part of the page, and leaves the others as they are. Each row is a run of
`ptq4sam quantize` and two or three of `ptq4sam evaluate`; what is finished in the work directory is
not run again. Without --coco-mini only the generated scenes are measured.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import json
import logging
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_sets import Data, data_sets, machine
from pages import with_part
from write_readme import README, with_table

from ptq4sam.families import build_sam
from ptq4sam.files import replacing, write_text
from ptq4sam.quantization.scheme import Scheme

_log = logging.getLogger("write_results")
_ROOT = Path(__file__).resolve().parents[1]

METHODS = {
    "float": ("-", None),
    "PTQ4SAM-S, W6A6": ("6 / 6", "ptq4sam-s66.yaml"),
    "QDrop, W6A6": ("6 / 6", "qdrop66.yaml"),
    "PTQ4SAM-L, W6A6": ("6 / 6", "ptq4sam-l66.yaml"),
    "PTQ4SAM-S, W4A4": ("4 / 4", "ptq4sam-s44.yaml"),
    "QDrop, W4A4": ("4 / 4", "qdrop44.yaml"),
    "PTQ4SAM-L, W4A4": ("4 / 4", "ptq4sam-l44.yaml"),
}
CLICKED = ("float", "PTQ4SAM-S, W6A6", "PTQ4SAM-S, W4A4")
"""Methods that are scored by clicks too."""
CLICKS = 5
MODEL = "vit_nano"
"""Whose part README's table is of."""


@dataclass(frozen=True)
class Benchmark(Data):
    """A data set with a calibration split and a detector."""

    detector: str
    detector_name: str


@dataclass(frozen=True)
class Row:
    """One measured method on one data set."""

    method: str
    truth: dict[str, Any]
    detected: dict[str, Any]
    clicked: dict[str, Any] | None = None


def measure(benchmark: Benchmark, method: str, arguments: argparse.Namespace) -> Row:
    """Quantize by a method where it is one, then evaluate with both kinds of boxes."""
    scheme = METHODS[method][1]
    folder = (
        arguments.work_dir
        / arguments.model
        / benchmark.name.replace(" ", "_")
        / (scheme or "float").removesuffix(".yaml")
    )
    checkpoint = ["--model", arguments.model]
    if scheme is not None:
        model = folder / "model.safetensors"
        if not model.exists():
            shortened = folder / scheme
            with replacing(shortened) as temporary:
                content = Scheme.from_yaml(_ROOT / "exp" / scheme).with_steps(arguments.steps)
                temporary.write_text(content.to_yaml())
            options = ["--model", arguments.model, "--scheme", str(shortened)]
            options += ["--calibration-size", str(arguments.calibration)]
            options += ["--calibration-images", str(benchmark.calibration_images)]
            options += ["--calibration-annotations", str(benchmark.calibration_annotations)]
            options += ["--output", str(model), "--work-dir", str(folder / "quantize")]
            _ptq4sam("quantize", *options)
        checkpoint = ["--checkpoint", str(model)]
    prompts = {"truth": "ground-truth", "detected": benchmark.detector}
    if method in CLICKED:
        prompts["clicked"] = f"clicks:{CLICKS}"
    scores = {
        name: _evaluate(benchmark, source, folder / name, checkpoint)
        for name, source in prompts.items()
    }
    return Row(method, **scores)


def _evaluate(
    benchmark: Benchmark, prompts: str, folder: Path, checkpoint: list[str]
) -> dict[str, Any]:
    metrics = folder / "metrics.json"
    if not metrics.exists():
        data = ["--images", str(benchmark.images), "--annotations", str(benchmark.annotations)]
        _ptq4sam("evaluate", *data, "--prompts", prompts, "--work-dir", str(folder), *checkpoint)
    content: dict[str, Any] = json.loads(metrics.read_text())
    return content


def _ptq4sam(*arguments: str) -> None:
    _log.info("ptq4sam %s", " ".join(arguments))
    command = [sys.executable, "-m", "ptq4sam", *arguments]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")


def table(benchmark: Benchmark, rows: list[Row]) -> list[str]:
    """The rows of a data set in Markdown."""
    base = rows[0]
    pictures, masks = base.truth["pictures"], base.truth["masks"]
    lines = [
        f"### {benchmark.name}",
        "",
        f"{pictures} pictures, {masks} objects; AP with boxes of {benchmark.detector_name}.",
        "",
        "| method | W / A bits | mean IoU | change | agreement | AP | AP50 | APs | APm | APl |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        iou = row.truth["mean_iou"]
        change = "" if row is base else f"{100 * (iou - base.truth['mean_iou']):+.1f}"
        agreement = row.truth.get("agreement")
        cells = [
            row.method,
            METHODS[row.method][0],
            f"{iou:.3f}",
            change,
            "" if agreement is None else f"{agreement:.3f}",
            *(f"{row.detected[key]:.1f}" for key in ("AP", "AP50", "APs", "APm", "APl")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, *_clicks(rows), ""]


def _clicks(rows: list[Row]) -> list[str]:
    """Mean IoU by number of clicks, and how far predicted IoUs are from true ones."""
    counts = range(1, CLICKS + 1)
    heads = ["method", *(f"{count} click{'s'[: count - 1]}" for count in counts)]
    heads += ["1 click, best of three", "IoU off, boxes", f"IoU off, {CLICKS} clicks"]
    lines = ["", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        if row.clicked is None:
            continue
        found = [row.clicked[f"mean_iou_clicks_{count}"] for count in counts]
        found += [row.clicked["mean_iou_best_of_three"]]
        found += [row.truth["iou_error"], row.clicked["iou_error"]]
        lines.append("| " + " | ".join([row.method, *(f"{x:.3f}" for x in found)]) + " |")
    return lines


_TOP = """\
# Results

Written by `python tools/write_results.py`; every number was measured by it. The models are small
and were trained on few pictures: these figures show what quantization costs, they do not compare
with those of the official SAM.

Mean IoU and agreement (mean IoU with the float model's masks) are with ground-truth boxes; change
is in points of mean IoU. The image encoder is quantized too. Clicks are made as in interactive
segmentation ([prompts.md](prompts.md)), with the mean IoU after each; "IoU off" is how far
predicted IoUs are from true ones, on average. Each row is one run, of one seed: figures that lie a
few tenths apart, or AP a point, may change their order with another
([experiments.md](experiments.md) has deviations over three seeds). Every quantized model passed the
audit.
"""


_OF_MODEL = """\
## {model}

{parameters:.1f} million parameters; {calibration} calibration pictures.{reconstruction}
"""


_RECONSTRUCTION = """\
 QDrop and PTQ4SAM-L reconstruct {steps} steps a unit with learning rates raised to match
(published: 20,000 steps)."""

_BIMODAL = """\
## What is done about bimodal keys

Keys of three attentions of `vit_nano_bimodal` were given two peaks that the float masks do not see;
`vit_nano` itself has none. BIG folds the signs of these three and nothing of `vit_nano`; in both it
gives the decoder's keys the published observer, too, which is all that it changes on `vit_nano`.
PTQ4SAM-S at 4 bits, the first 40 pictures of coco_mini val with ground-truth boxes, 32 calibration
pictures drawn by each of {seeds} seeds; mean and standard deviation over seeds
(`ptq4sam sweep two-peaks`).

| model | keys | mean IoU | agreement | AP |
|---|---|---|---|---|
"""


def bimodal_part(sweep: Path) -> str:
    """The part of a finished sweep of exp/sweeps/two-peaks.yaml."""
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    with sweep.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            groups.setdefault((row["model"], row["keys"]), []).append(row)

    def mean(rows: list[dict[str, str]], key: str, digits: int) -> str:
        values = [float(row[key]) for row in rows]
        return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"

    lines = [
        f"| {model} | {keys} | {mean(rows, 'mean_iou', 4)} | {mean(rows, 'agreement', 4)} | "
        f"{mean(rows, 'AP', 1)} |"
        for (model, keys), rows in groups.items()
    ]
    introduction = _BIMODAL.format(seeds=len(next(iter(groups.values()))))
    return introduction + "\n".join(lines) + f"\n\nMeasured on {machine()}.\n"


def page(sections: list[list[str]], arguments: argparse.Namespace, versions: dict[str, str]) -> str:
    """The part of one model."""
    used = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    weights = build_sam(arguments.model).parameters()
    parts = [
        _OF_MODEL.format(
            model=arguments.model,
            parameters=sum(weight.numel() for weight in weights) / 1e6,
            reconstruction=""
            if arguments.statistics_only
            else _RECONSTRUCTION.format(steps=arguments.steps),
            calibration=arguments.calibration,
        ),
        *("\n".join(section) for section in sections),
        f"Measured on {arguments.machine}; {used}.\n",
    ]
    return "\n".join(parts)


def benchmarks(arguments: argparse.Namespace) -> list[Benchmark]:
    """The data sets that are at hand, each with its detector."""
    detectors = [
        ("scene-detector", "the scene detector"),
        (f"onnx:{arguments.yolox}", "YOLOX-Nano"),
    ]
    found = data_sets(arguments.work_dir, arguments.coco_mini)
    return [
        Benchmark(**vars(data), detector=detector, detector_name=name)
        for data, (detector, name) in zip(found, detectors, strict=False)
    ]


def main() -> None:
    """Measure everything and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--coco-mini", type=Path, help="folder of coco_mini")
    parser.add_argument("--yolox", type=Path, help="YOLOX ONNX file for coco_mini")
    parser.add_argument("--steps", type=int, default=400, help="reconstruction steps a unit")
    parser.add_argument("--calibration", type=int, default=32, help="calibration pictures")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--work-dir", type=Path, default=_ROOT / "work_dirs" / "results")
    parser.add_argument("--out", type=Path, default=_ROOT / "docs" / "results.md")
    parser.add_argument("--machine", default=machine())
    parser.add_argument("--model", default=MODEL, help="a trained SAM of ours")
    parser.add_argument("--statistics-only", action="store_true", help="no reconstruction")
    parser.add_argument("--bimodal", type=Path, help="write the part of this finished sweep alone")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if arguments.bimodal is not None:
        _write(bimodal_part(arguments.bimodal), arguments.out)
        return
    if (arguments.coco_mini is None) != (arguments.yolox is None):
        parser.error("--coco-mini and --yolox belong together")
    methods = [
        name
        for name, (_, scheme) in METHODS.items()
        if scheme is None
        or not arguments.statistics_only
        or Scheme.from_yaml(_ROOT / "exp" / scheme).recon is None
    ]
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        futures = {
            benchmark: [pool.submit(measure, benchmark, method, arguments) for method in methods]
            for benchmark in benchmarks(arguments)
        }
        measured = {b: [future.result() for future in rows] for b, rows in futures.items()}
    sections = [table(benchmark, rows) for benchmark, rows in measured.items()]
    versions = next(iter(measured.values()))[0].truth["versions"]
    _write(page(sections, arguments, versions), arguments.out)


def _write(part: str, out: Path) -> None:
    old = out.read_text(encoding="utf-8") if out.exists() else ""
    write_text(with_part(old, _TOP, part), out)
    if out == _ROOT / "docs" / "results.md":
        readme = with_table(README.read_text(encoding="utf-8"), out.read_text(encoding="utf-8"))
        write_text(readme, README)


if __name__ == "__main__":
    main()
