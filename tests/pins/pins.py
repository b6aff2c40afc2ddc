"""What the quantized vit_nano gave when it was last recorded, bit for bit; see tools/write_pins.py.

Bits of a calibration depend on the order of float sums, and so on processor and versions. What was
recorded says where, and holds there. Values, not bytes, of exported graphs are the simulation's.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ptq4sam.data.scenes import Scene, generate_scene
from ptq4sam.deploy.storage import save
from ptq4sam.families.checkpoint import load_sam
from ptq4sam.model.calibration import CalibrationItem
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.numerics import reproducible
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import PromptableModel, Sam
from ptq4sam.sam.predictor import Predictor
from tests.tiny_runs import QUICK

RECORDED = Path(__file__).with_name("pins.json")
SCHEMES = Path(__file__).parents[2] / "exp"
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "W8A8": ("w8a8", ()),
    "W6A6 PTQ4SAM-S": ("ptq4sam-s66", ()),
    "W4A4 PTQ4SAM-S": ("ptq4sam-s44", ()),
    "W4A4 PTQ4SAM-L": ("ptq4sam-l44", ("recon.iters=20",)),
}
"""Schemes of exp/, with what is changed in them."""
CALIBRATION = (100, 101, 102)
EVALUATION = 200
"""Seeds of generated scenes."""
_BOXES = 3


def here() -> dict[str, str]:
    """What the bits depend on."""
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        **{name: version(name) for name in ("torch", "numpy", "scipy", "pillow")},
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    found = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {name.strip(): value.strip() for name, value in found.items()}
    return " ".join(fields.get(name, "") for name in ("model name", "cpu family", "model"))


@functools.cache
def nano() -> Sam:
    """The embedded model."""
    return load_sam("vit_nano")


@functools.cache
def quantized(case: str, quick: bool = False) -> QuantizedSam:
    """vit_nano quantized as a case says, on one thread: their number changes sums too.

    Args:
        case: a key of CASES.
        quick: on one scene, with hardly a search for ranges, and two steps of learning at most:
            for what holds of any quantized model.
    """
    file, overrides = CASES[case]
    scheme = Scheme.from_yaml(SCHEMES / f"{file}.yaml").with_overrides(*overrides)
    if quick:
        scheme = scheme.with_overrides(*QUICK, "ptq4sam.taus=[2]")
        scheme = scheme if scheme.recon is None else scheme.with_overrides("recon.iters=2")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with reproducible():
            seeds = CALIBRATION[:1] if quick else CALIBRATION
            items = [_item(nano(), generate_scene(seed)) for seed in seeds]
            return quantize_sam(nano(), items, scheme, seed=1)
    finally:
        torch.set_num_threads(threads)


def _item(sam: Sam, scene: Scene) -> CalibrationItem:
    predictor = Predictor(sam)
    embedding = predictor.embed(scene.image)
    boxes = torch.from_numpy(np.stack([one.box for one in scene.instances[:_BOXES]]))
    height, width = (
        new / old for new, old in zip(embedding.input_size, embedding.original_size, strict=True)
    )
    scaled = boxes * boxes.new_tensor([width, height, width, height])
    return CalibrationItem(predictor.pixels(scene.image), scaled)


def outputs(sam: PromptableModel) -> dict[str, Tensor]:
    """Encoder output, mask logits and predicted IoUs of a generated scene."""
    scene = generate_scene(EVALUATION)
    predictor = Predictor(sam)
    with reproducible():
        embedding = predictor.embed(scene.image)
        boxes = np.stack([one.box for one in scene.instances[:_BOXES]])
        prediction = predictor.predict(boxes=boxes, multimask=True, embedding=embedding)
    return {
        "embedding": embedding.features,
        "masks": prediction.low_res,
        "ious": prediction.iou_predictions,
    }


def packed(sam: QuantizedSam, folder: Path) -> dict[str, str]:
    """Tensors of a packed file: codes by name; of quantizers, whose names may change, values."""
    path = folder / "packed.safetensors"
    save(sam, path)
    tensors = load_file(path)
    codes = {name: digest(x) for name, x in tensors.items() if name.endswith(".codes")}
    own = {n: digest(x) for n, x in tensors.items() if n not in codes and "_quantizer." not in n}
    grids = [digest(x) for name, x in tensors.items() if "_quantizer." in name]
    return {
        "codes": _joined(f"{name} {value}" for name, value in codes.items()),
        "float": _joined(f"{name} {value}" for name, value in own.items()),
        "grids": _joined(grids),
    }


def _joined(texts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(texts)).encode()).hexdigest()


def digest(tensor: Tensor) -> str:
    """SHA-256 of type, shape and values."""
    array = tensor.detach().cpu().contiguous().numpy()
    head = f"{array.dtype} {array.shape} "
    return hashlib.sha256(head.encode() + array.tobytes()).hexdigest()


def record(case: str, folder: Path) -> dict[str, str]:
    """All that is pinned of a case."""
    sam = quantized(case)
    return {name: digest(x) for name, x in outputs(sam).items()} | packed(sam, folder)


def recorded() -> dict[str, Any]:
    """What the file holds: `here`, and a record by case."""
    content: dict[str, Any] = json.loads(RECORDED.read_text(encoding="utf-8"))
    return content
