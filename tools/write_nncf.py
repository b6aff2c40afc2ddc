"""Compare our schemes with NNCF's INT8 on one runtime, OpenVINO, and write docs/nncf.md.

    python tools/write_nncf.py --coco-mini DIR --out docs/nncf.md [--calibration N] [--limit N]

vit_nano, float and quantized in each way, is exported and scored by the same code: with
ground-truth boxes, and by masks of everything. What is finished in the work directory is not done
again, but for the times, which are measured in turns at the end. Without --coco-mini only generated
scenes are measured. Time and size of a SAM-B: benchmarks/deployed_encoder.py.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from pathlib import Path
from typing import Any

# Before torch, which then knows how its threads wait.
from ptq4sam.allocator import keep_freed_memory

# isort: split
import numpy as np
import torch
from data_sets import Data, data_sets, machine
from write_agreement import mask_agreement

from ptq4sam.cli import main as ptq4sam
from ptq4sam.data import CocoDataset
from ptq4sam.data.segmentation import encode_masks
from ptq4sam.deploy.exported import ExportedSam, open_exported
from ptq4sam.evaluation import best_ious
from ptq4sam.evaluation.evaluate import evaluate_sam
from ptq4sam.evaluation.prompting import Prompting
from ptq4sam.everything import EverythingSettings, MaskGenerator
from ptq4sam.files import replacing, write_json
from ptq4sam.prompts import GroundTruth
from ptq4sam.runs.reproducibility import versions
from ptq4sam.sam.predictor import Predictor

_log = logging.getLogger("write_nncf")
_ROOT = Path(__file__).resolve().parents[1]

MODEL = "vit_nano"
FLOAT, NNCF, CONTROLLED = "float32", "NNCF INT8", "NNCF INT8, controlled"
# What NNCF does not quantize: the decoder's units, as in ptq4sam/model/insertion.py.
_LAYER_UNITS = ("self_attn", "cross_attn_token_to_image", "mlp", "cross_attn_image_to_token")
_DECODER_UNITS = [
    *(f"layers.{layer}.{unit}" for layer in range(2) for unit in _LAYER_UNITS),
    "final_attn_token_to_image",
]
_FLOAT_DECODER = ", ".join(f"mask_decoder.transformer.{unit}: float" for unit in _DECODER_UNITS)
ENCODER_ONLY = "ours W8A8, float decoder"
SCHEMES = {
    ENCODER_ONLY: "w8a8",
    "ours W8A8": "w8a8",
    "PTQ4SAM-S W6A6": "ptq4sam-s66",
    "PTQ4SAM-S W4A4": "ptq4sam-s44",
}
MODELS = (FLOAT, NNCF, CONTROLLED, *SCHEMES)

# Of single points vit_nano is less sure than a SAM.
EVERYTHING = EverythingSettings(points_per_side=8, pred_iou_thresh=0.3, stability_score_thresh=0.1)


class Comparison:
    """All models of one data set, kept in a folder."""

    def __init__(self, data: Data, arguments: argparse.Namespace) -> None:
        self._data, self._arguments = data, arguments
        self.folder: Path = arguments.work_dir / data.name.replace(" ", "_")

    def export_of(self, name: str) -> Path:
        """The folder of a model's files, made where it is missing."""
        folder = self.folder / name.lower().replace(" ", "_").replace(",", "")
        if (folder / "openvino.json").exists():
            return folder
        _log.info("%s: making %s", self._data.name, name)
        if name == FLOAT:
            _run("export", MODEL, "--format", "openvino", "--output", folder)
        elif name in SCHEMES:
            packed = folder.with_suffix(".safetensors")
            if not packed.exists():
                scheme = _ROOT / "exp" / f"{SCHEMES[name]}.yaml"
                more = ["--scheme", scheme, "--work-dir", self.folder / "run"]
                if name == ENCODER_ONLY:
                    more += ["--scheme-options", f"units={{{_FLOAT_DECODER}}}"]
                _run("quantize", *self._calibration(), *more, "--output", packed)
            _run("export", packed, "--format", "openvino", "--fast", "--output", folder)
        else:
            # Built apart and moved at the end: an export says it is whole before NNCF comes.
            building = folder.with_name(f"{folder.name}.building")
            more = self._control() if name == CONTROLLED else []
            _run("quantize", "--method", "nncf", *self._calibration(), *more, "--output", building)
            building.rename(folder)
        return folder

    def _calibration(self) -> list[object]:
        data, size = self._data, self._arguments.calibration
        return [
            *("--model", MODEL, "--calibration-images", data.calibration_images),
            *("--calibration-annotations", data.calibration_annotations),
            *("--calibration-size", size),
        ]

    def _control(self) -> list[object]:
        """On calibration pictures: those that are scored are not to be fitted to."""
        data = self._data
        return [
            *("--max-drop", self._arguments.max_drop),
            *("--validation-images", data.calibration_images),
            *("--validation-annotations", data.calibration_annotations),
            *("--validation-limit", self._arguments.calibration),
        ]

    def row(self, name: str) -> dict[str, Any]:
        """Scores, masks and bytes of a model."""
        path = self.folder / f"{self.export_of(name).name}.json"
        if not path.exists():
            _log.info("%s: scoring %s", self._data.name, name)
            write_json(self._score(name), path)
        row: dict[str, Any] = json.loads(path.read_text())
        return row

    def _score(self, name: str) -> dict[str, Any]:
        folder = self.export_of(name)
        model = open_exported(folder, "openvino")
        dataset = CocoDataset(
            self._data.images, self._data.annotations, limit=self._arguments.limit
        )
        found = evaluate_sam(model, dataset, GroundTruth(dataset), Prompting())
        encoder = [folder / f"encoder{suffix}" for suffix in (".xml", ".bin")]
        return {
            "metrics": found.metrics,
            "pictures": found.pictures,
            "masks": found.results,
            "everything": everything(model, dataset, self._arguments.everything),
            "encoder_bytes": sum(file.stat().st_size for file in encoder),
            "bytes": sum((folder / file).stat().st_size for file in model.manifest.files),
            "packed_bytes": _size(folder.with_suffix(".safetensors")),
        }

    def milliseconds(self) -> dict[str, float]:
        """Median time of encoding a picture, the models in turns, after one that does not count."""
        names = self._arguments.models
        models = {name: open_exported(self.export_of(name), "openvino") for name in names}
        side = models[FLOAT].image_size
        pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
        times: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(self._arguments.rounds + 1):
            for name, model in models.items():
                started = time.perf_counter()
                model.embed(pixels)
                times[name].append(time.perf_counter() - started)
        return {name: 1000 * statistics.median(found[1:]) for name, found in times.items()}


def everything(model: ExportedSam, dataset: CocoDataset, pictures: int) -> dict[str, float]:
    """Masks of everything on the first pictures, and how well annotated objects are among them."""
    generator = MaskGenerator(Predictor(model), EVERYTHING)
    source, best, masks = GroundTruth(dataset), [], []
    for record in dataset.annotated_images()[:pictures]:
        found = generator.generate(dataset.load(record))
        objects = encode_masks(source.truth(record))
        best += best_ious(objects, found.segmentations).tolist()
        masks.append(len(found))
    return {"mean_best_iou": float(np.mean(best)), "masks": float(np.mean(masks))}


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None


def _run(*arguments: object) -> None:
    if ptq4sam([str(argument) for argument in arguments]):
        raise RuntimeError(f"ptq4sam {arguments[0]} failed: see the line above")


HEADER = [
    "| model | mean IoU | AP | masks: IoU with float | everything: best IoU, masks | encode ms "
    "| faster than float | encoder MB | all MB | packed MB |",
    "|---|---|---|---|---|---|---|---|---|---|",
]


def section(data: Data, arguments: argparse.Namespace) -> list[str]:
    """One data set's table in Markdown."""
    comparison = Comparison(data, arguments)
    rows = {name: comparison.row(name) for name in arguments.models}
    times = comparison.milliseconds()
    reference = rows[FLOAT]
    lines = [
        f"## {data.name}",
        "",
        f"{reference['pictures']} pictures, {len(reference['masks'])} objects.",
        "",
        *HEADER,
    ]
    for name, row in rows.items():
        found, packed = row["everything"], row["packed_bytes"]
        columns = [
            name,
            f"{row['metrics']['mean_iou']:.4f}",
            f"{row['metrics']['AP']:.2f}",
            f"{mask_agreement(row['masks'], reference['masks']):.4f}",
            f"{found['mean_best_iou']:.3f}, {found['masks']:.1f}",
            f"{times[name]:.1f}",
            f"{times[FLOAT] / times[name]:.2f}",
            f"{row['encoder_bytes'] / 1e6:.2f}",
            f"{row['bytes'] / 1e6:.2f}",
            "" if packed is None else f"{packed / 1e6:.2f}",
        ]
        lines.append("| " + " | ".join(columns) + " |")
    return [*lines, ""]


_INTRODUCTION = """\
# Our schemes beside NNCF's INT8

Written by `python tools/write_nncf.py {options}`; every number was measured by it. `vit_nano` on
OpenVINO's CPU runtime, float32 for what is not integer, {threads} thread(s); {calibration}
calibration pictures for each way. NNCF quantizes the image encoder (model type transformer, mixed
preset) and leaves the decoder float, as OpenVINO's notebooks do; "controlled" is its
accuracy-controlled variant, which may lose {max_drop} points of mean IoU on the calibration
pictures. Ours quantize encoder and decoder by statistics, in one row the encoder alone, as NNCF
does. W6A6 and W4A4 are PTQ4SAM-S, with bimodal integration and adaptive granularity throughout.
W8A8 is not: `exp/w8a8.yaml` has signed codes without zero points, no bimodal integration, and
adaptive granularity in the decoder alone, even softmax codes in the encoder. Files are of the fast
form (`ptq4sam export --fast`), float operators being OpenVINO's own in all rows.
Codes of 4 and 6 bits run as bytes; in the encoder's files weights of up to 4 bits take half a byte,
in the packed file, which `ptq4sam quantize` writes, all take their bits. "Everything" is automatic
mask generation on {everything} pictures: the mean IoU of each annotated object with the mask that
fits it best, and masks a picture; thresholds are those of `ptq4sam everything` but for
{thresholds}, since `vit_nano` is unsure of single points. Encoding times are medians of {rounds},
the models in turns; the machine may have been shared, so that only their ratios say something.
"""


def _options(arguments: argparse.Namespace) -> list[str]:
    """The options that numbers depend on, as they would be given again."""
    options = [f"--calibration {arguments.calibration}", f"--rounds {arguments.rounds}"]
    options.append(f"--everything {arguments.everything}")
    return options if arguments.limit is None else [*options, f"--limit {arguments.limit}"]


def _thresholds() -> list[str]:
    """Settings of `EVERYTHING` that are not the defaults."""
    usual = EverythingSettings().to_dict()
    return [f"`{k}` {v}" for k, v in EVERYTHING.to_dict().items() if v != usual[k]]


def main() -> None:
    """Measure everything and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--coco-mini", type=Path, help="folder of coco_mini")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS, metavar="MODEL")
    parser.add_argument("--without-scenes", action="store_true", help="coco_mini alone")
    parser.add_argument("--calibration", type=int, default=32, help="calibration pictures")
    parser.add_argument("--max-drop", type=float, default=0.5, help="of the controlled variant")
    parser.add_argument("--limit", type=int, help="evaluate the first pictures only")
    parser.add_argument("--everything", type=int, default=10, help="pictures without prompts")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--work-dir", type=Path, default=_ROOT / "work_dirs" / "nncf")
    parser.add_argument("--out", type=Path, default=_ROOT / "docs" / "nncf.md")
    parser.add_argument("--machine", default=machine())
    arguments = parser.parse_args()
    if FLOAT not in arguments.models:
        parser.error(f"--models needs {FLOAT}, which the others are compared with")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    keep_freed_memory()
    available = data_sets(arguments.work_dir, arguments.coco_mini)
    chosen = available[1:] if arguments.without_scenes else available
    sections = [section(data, arguments) for data in chosen]
    used = ", ".join(f"{name} {version}" for name, version in sorted(versions().items()))
    introduction = _INTRODUCTION.format(
        calibration=arguments.calibration,
        max_drop=arguments.max_drop,
        everything=arguments.everything,
        rounds=arguments.rounds,
        threads=torch.get_num_threads(),
        options=" ".join(_options(arguments)),
        thresholds=", ".join(_thresholds()),
    )
    parts = [introduction, *("\n".join(lines) for lines in sections)]
    parts.append(f"Measured on {arguments.machine}; {used}.\n")
    with replacing(arguments.out) as temporary:
        temporary.write_text("\n".join(parts))


if __name__ == "__main__":
    main()
