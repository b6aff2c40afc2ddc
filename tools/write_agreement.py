"""Measure whether deployed models do what the simulation promises, and write docs/agreement.md.

    python tools/write_agreement.py --limit 12 --coco-mini DIR --out docs/agreement.md
    python tools/write_agreement.py --model efficientvit_sam_nano --limit 12 ...

A small SAM is quantized by each scheme, saved and exported; then the float model, the simulation,
the integer reference and the exported files are scored on the same boxes (ground truth) by the same
code. Each model has its part of the page, others stay. What is finished in the work directory is
not measured again. Without --coco-mini only the generated scenes are measured.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptq4sam.allocator import keep_freed_memory

# Before torch, which then knows how its threads wait.
from ptq4sam.families.family import ASSETS
from ptq4sam.sam.model import Features

# isort: split
import numpy as np
import torch
from data_sets import Data, data_sets, machine
from pages import with_part
from torch import Tensor

from ptq4sam.cli import main as ptq4sam
from ptq4sam.data import CocoDataset
from ptq4sam.deploy.backends import open_backend
from ptq4sam.deploy.storage import load
from ptq4sam.evaluation.evaluate import evaluate_sam
from ptq4sam.evaluation.prompting import Prompting
from ptq4sam.families.checkpoint import load_sam
from ptq4sam.files import replacing, write_json
from ptq4sam.prompts import GroundTruth
from ptq4sam.runs.reproducibility import versions
from ptq4sam.runs.verifying import GOAL
from ptq4sam.sam.model import PromptableModel, Sam
from ptq4sam.sam.predictor import Predictor

_log = logging.getLogger("write_agreement")
_ROOT = Path(__file__).resolve().parents[1]

SCHEMES = {
    "vit_nano": {"W8A8": "w8a8", "W6A6": "ptq4sam-s66", "W4A4": "ptq4sam-s44"},
    "efficientvit_sam_nano": {"W8A8": "efficientvit_sam/w8a8"},
}
"""By model, files in exp by the names of rows."""
FLOAT, SIMULATION = "float", "simulation"
NOISES = {f"noise-{size:g}": size for size in (1e-7, 1e-6)}
"""Of normalised pixels, the smaller one a float32's own rounding: a byte of a picture is 1e-2."""
FAST = "openvino-fast"
BACKENDS = {
    SIMULATION: "torch",
    "integer reference": "integer",
    "ONNX Runtime": "onnxruntime",
    "OpenVINO": "openvino",
    "OpenVINO, fast": FAST,
    **{f"simulation, pixels + {size:g}": kind for kind, size in NOISES.items()},
}
GOAL_AP = 0.2
"""How far the AP of a deployed model may be from the simulation's."""
FORMATS = {"onnxruntime": "onnx", "openvino": "openvino", FAST: "openvino"}
BOXES_TIMED = 16


class Noisy:
    """A model that sees each picture with a little noise: how far can two correct results be?"""

    def __init__(self, sam: Sam, size: float) -> None:
        self._sam = sam
        self._size = size
        self._generator = torch.Generator().manual_seed(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sam, name)

    def embed(self, pixels: Tensor) -> Features:
        """As `Sam.embed`, of pixels with noise."""
        noise = torch.randn(pixels.shape, generator=self._generator)
        return self._sam.embed(pixels + self._size * noise)


class Measurement:
    """All measurements on one data set, kept in a folder."""

    def __init__(self, data: Data, arguments: argparse.Namespace) -> None:
        self._data = data
        self._model: str = arguments.model
        self._schemes = SCHEMES[self._model]
        self._folder: Path = arguments.work_dir / self._model / data.name.replace(" ", "_")
        self._limit: int | None = arguments.limit
        self._calibration: int = arguments.calibration
        self._only_measured: bool = arguments.only_measured

    def row(self, scheme: str | None, backend: str) -> dict[str, Any] | None:
        """Scores, masks, milliseconds and bytes of a model on a backend; `scheme` None is float.

        None where it was not measured and is not to be.
        """
        kind = BACKENDS.get(backend)
        name = FLOAT if scheme is None else f"{Path(self._schemes[scheme]).name}-{kind}"
        path = self._folder / f"{name}.json"
        if not path.exists() and self._only_measured:
            return None
        if not path.exists():
            _log.info("%s: %s %s", self._data.name, scheme or FLOAT, backend)
            write_json(self._measure(scheme, backend), path)
        row: dict[str, Any] = json.loads(path.read_text())
        return row

    def _measure(self, scheme: str | None, backend: str) -> dict[str, Any]:
        model, files = self._open(scheme, backend)
        dataset = CocoDataset(self._data.images, self._data.annotations, limit=self._limit)
        found = evaluate_sam(model, dataset, GroundTruth(dataset), Prompting())
        encode, decode = milliseconds(model)
        return {
            "metrics": found.metrics,
            "pictures": found.pictures,
            "masks": found.results,
            "encode_ms": encode,
            "decode_ms": decode,
            "bytes": sum(file.stat().st_size for file in files),
        }

    def _open(self, scheme: str | None, backend: str) -> tuple[PromptableModel, list[Path]]:
        """The model, and the files that it is read from."""
        if scheme is None:
            return load_sam(self._model), [ASSETS / f"{self._model}.safetensors"]
        checkpoint = self._quantized(scheme)
        kind = BACKENDS[backend]
        if kind == BACKENDS[SIMULATION]:
            return load(checkpoint), [checkpoint]
        if kind in NOISES:
            return Noisy(load(checkpoint), NOISES[kind]), [checkpoint]
        if kind not in FORMATS:
            return open_backend(checkpoint, kind), [checkpoint]
        folder, runtime = checkpoint.with_suffix(f".{kind}"), kind.removesuffix("-fast")
        fast = ["--fast"] if kind == FAST else []
        _run("export", checkpoint, "--format", FORMATS[kind], "--output", folder, *fast)
        manifest = json.loads((folder / f"{FORMATS[kind]}.json").read_text())
        return open_backend(folder, runtime), [folder / name for name in manifest["files"]]

    def _quantized(self, scheme: str) -> Path:
        file = self._schemes[scheme]
        path = self._folder / f"{Path(file).name}.safetensors"
        if not path.exists():
            data = self._data
            _run(
                "quantize",
                *("--model", self._model, "--scheme", _ROOT / "exp" / f"{file}.yaml"),
                *("--calibration-images", data.calibration_images),
                *("--calibration-annotations", data.calibration_annotations),
                *("--calibration-size", self._calibration, "--output", path),
                *("--work-dir", self._folder / Path(file).name),
            )
        return path


def _run(*arguments: object) -> None:
    if ptq4sam([str(argument) for argument in arguments]):
        raise RuntimeError(f"ptq4sam {arguments[0]} failed: see the line above")


@torch.no_grad()
def milliseconds(model: PromptableModel, rounds: int = 5) -> tuple[float, float]:
    """Median time of encoding a picture of noise, and of decoding 16 boxes on it."""
    side = model.geometry.encoder_side
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
    corners = generator.uniform(0, side / 2, (BOXES_TIMED, 2))
    boxes = np.concatenate([corners, corners + side / 3], axis=1)
    predictor = Predictor(model)
    times: list[list[float]] = [[], []]
    for _ in range(rounds + 1):
        started = time.perf_counter()
        embedding = predictor.embed(image)
        encoded = time.perf_counter()
        predictor.predict(boxes=boxes, embedding=embedding)
        times[0].append(encoded - started)
        times[1].append(time.perf_counter() - encoded)
    encode, decode = (1000 * statistics.median(found[1:]) for found in times)
    return encode, decode


def mask_agreement(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]]) -> float:
    """Mean IoU of the masks of two models for the same boxes, both in the COCO results format."""
    from pycocotools import mask as coco_mask

    ious = []
    for ours, theirs in zip(first, second, strict=True):
        if ours["image_id"] != theirs["image_id"]:
            raise ValueError("the masks are not those of the same boxes")
        pair = [ours["segmentation"]], [theirs["segmentation"]]
        both_empty = all(coco_mask.area(one[0]) == 0 for one in pair)
        ious.append(1.0 if both_empty else float(coco_mask.iou(*pair, [0])[0, 0]))
    return float(np.mean(ious))


HEADER = [
    "| scheme | backend | mean IoU | AP | AP - simulation | masks: IoU with simulation "
    "| encode ms | 16 boxes ms | MB | goal |",
    "|---|---|---|---|---|---|---|---|---|---|",
]


def section(data: Data, arguments: argparse.Namespace) -> list[str]:
    """One data set's table in Markdown."""
    measurement = Measurement(data, arguments)
    reference = measurement.row(None, FLOAT)
    if reference is None:
        return []
    lines = [
        f"### {data.name}",
        "",
        f"{reference['pictures']} pictures, {len(reference['masks'])} objects.",
        "",
        *HEADER,
        cells("", FLOAT, reference, None),
    ]
    for scheme in SCHEMES[arguments.model]:
        simulation = measurement.row(scheme, SIMULATION)
        for backend in BACKENDS:
            row = measurement.row(scheme, backend)
            if row is not None:
                lines.append(cells(scheme, backend, row, simulation))
    return [*lines, ""]


def cells(scheme: str, backend: str, row: dict[str, Any], simulation: dict[str, Any] | None) -> str:
    """A row of the table."""
    metrics = row["metrics"]
    compared, verdict = ["", ""], ""
    if simulation is not None and backend != SIMULATION:
        agreement = mask_agreement(row["masks"], simulation["masks"])
        difference = metrics["AP"] - simulation["metrics"]["AP"]
        compared = [f"{difference:+.2f}", f"{agreement:.4f}"]
        if BACKENDS[backend] not in NOISES:
            verdict = _verdict(agreement, difference)
    columns = [
        scheme,
        backend,
        f"{metrics['mean_iou']:.4f}",
        f"{metrics['AP']:.2f}",
        *compared,
        f"{row['encode_ms']:.0f}",
        f"{row['decode_ms']:.0f}",
        f"{row['bytes'] / 1e6:.2f}",
        verdict,
    ]
    return "| " + " | ".join(columns) + " |"


def _verdict(agreement: float, difference: float) -> str:
    """Which parts of the goal a row misses."""
    missed = [
        *(["masks"] if agreement < GOAL else []),
        *(["AP"] if round(abs(difference), 2) > GOAL_AP else []),
    ]
    return f"misses {' and '.join(missed)}" if missed else "met"


_TOP = f"""\
# Does the device do what the simulation says?

Written by `python tools/write_agreement.py`; every number was measured by it. Small SAMs, encoder
and decoder quantized, with ground-truth boxes, scored by the same code on every backend. Bytes are
those of the files that a backend reads: the simulation and the integer reference read the packed
file, ONNX Runtime and OpenVINO what `ptq4sam export` wrote (codes of 6 bits in bytes). Times are of
a machine that was shared: ratios in [benchmarks.md](benchmarks.md) are measured apart.

The goal is an IoU of masks with the simulation of {GOAL}, and an AP within {GOAL_AP} of its own.
The last column says which rows meet it. Every product of codes is a sum of whole numbers that is
exact wherever it is computed, and what lies between them is made of operations that all round alike
(`quantization/portable.py`): the integer reference, ONNX Runtime and OpenVINO have the
simulation's codes; masks may differ by last bits of the float layers behind the last quantizer.
"OpenVINO, fast" is `ptq4sam export --fast`: its own norms, softmaxes and GELUs differ in the last
bit, a few codes of a picture in the middle of two are rounded the other way, and the network
amplifies each. Rows of the simulation with noise on the normalised pixels (deviation 1) say how
much so little does to it. On few pictures the AP moves by several tenths for one mask.
"""

_OF_MODEL = """\
## {model}

{calibration} calibration pictures; {limit} pictures of each data set; {threads} thread(s).
"""


def main() -> None:
    """Measure everything and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=SCHEMES, default="vit_nano", help="default: vit_nano")
    parser.add_argument("--coco-mini", type=Path, help="folder of coco_mini")
    parser.add_argument("--calibration", type=int, default=32, help="calibration pictures")
    parser.add_argument("--limit", type=int, help="evaluate the first pictures only")
    parser.add_argument(
        "--only-measured", action="store_true", help="measure nothing more, write what there is"
    )
    parser.add_argument("--work-dir", type=Path, default=_ROOT / "work_dirs" / "agreement")
    parser.add_argument("--out", type=Path, default=_ROOT / "docs" / "agreement.md")
    parser.add_argument("--machine", default=machine())
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    keep_freed_memory()
    available = data_sets(arguments.work_dir, arguments.coco_mini)
    sections = [section(data, arguments) for data in available]
    used = ", ".join(f"{name} {version}" for name, version in sorted(versions().items()))
    introduction = _OF_MODEL.format(
        model=arguments.model,
        calibration=arguments.calibration,
        limit="all" if arguments.limit is None else f"the first {arguments.limit}",
        threads=torch.get_num_threads(),
    )
    parts = [introduction, *("\n".join(lines) for lines in sections)]
    parts.append(f"Measured on {arguments.machine}; {used}.\n")
    old = arguments.out.read_text() if arguments.out.exists() else ""
    with replacing(arguments.out) as temporary:
        temporary.write_text(with_part(old, _TOP, "\n".join(parts)))


if __name__ == "__main__":
    main()
