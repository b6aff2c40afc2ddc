"""Checks of `gpu_check.py`: the machine, a whole model, the same again, limits."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

import ptq4sam
from ptq4sam.data.scenes import write_scenes
from ptq4sam.errors import is_out_of_memory
from ptq4sam.families import build_sam
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.model.memory import free_memory
from ptq4sam.quantization.grid import Grid, fake_quantize
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.runs.auditing import audit_model
from ptq4sam.runs.reproducibility import versions
from ptq4sam.sam.predictor import Predictor

T = TypeVar("T")
Found = Iterator[tuple[Any, ...]]
_ROOT = Path(__file__).resolve().parents[1]
_FAST = (
    "ptq4sam.methods.graphs",
    "ptq4sam.quantization.fused",
    "ptq4sam.quantization.whole",
)
"""Loggers that say where something has to go a slower way."""
_SMALL = "vit_nano:depth=2,global_attn_indexes=[1],image_size=64,window_size=3"
_BOXES = np.array([[20.0, 20, 120, 140], [60, 30, 200, 180]])


def environment(device: str, _small: bool) -> Found:
    """What the machine is, and what decides about its numbers."""
    yield from versions().items()
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    yield "C compiler and Python.h", f"{shutil.which('cc')}, {header.exists()}"
    yield "matmul precision", torch.get_float32_matmul_precision()
    yield (
        "cuDNN TF32, deterministic, benchmark",
        str(
            [getattr(torch.backends.cudnn, n) for n in ("allow_tf32", "deterministic", "benchmark")]
        ),
    )
    set_here = {k: v for k, v in os.environ.items() if "TF32" in k or "CUDA_ALLOC" in k}
    yield "variables", json.dumps(set_here)
    if torch.device(device).type == "cuda":
        known = torch.cuda.get_device_properties(device)
        yield "GPU", f"{known.name}, {known.major}.{known.minor}, {known.multi_processor_count} SMs"
        yield "memory", known.total_memory / 2**30, "GiB"


def smoke(device: str, small: bool) -> Found:
    """vit_nano all the way: calibrate, reconstruct, freeze, audit, save, load on a CPU, segment."""
    steps = _NoWaiting(torch.device(device))
    with tempfile.TemporaryDirectory() as folder, _slower_ways() as slower:
        quantized = _quantized(device, Path(folder), 5 if small else 20, small, steps)
        elsewhere = {
            name
            for name, tensor in (*quantized.named_parameters(), *quantized.named_buffers())
            if tensor.device.type != torch.device(device).type
        }
        yield (
            "tensors on another device",
            ", ".join(sorted(elsewhere)[:5]) or "none",
            "",
            not elsewhere,
        )
        on_gpu = torch.device(device).type == "cuda"
        enough = steps.watched > 0 if on_gpu else None
        yield "steps watched, of which none made the host wait", steps.watched, "", enough
        yield (
            "kernels or graphs that had to be given up",
            "; ".join(slower) or "none",
            "",
            not slower,
        )
        report = audit_model(quantized)
        yield "audit", report.lines()[0], "", report.passed
        file = Path(folder, "model.safetensors")
        ptq4sam.save(quantized, file)
        loaded = ptq4sam.load(file)
        known = loaded.state_dict()
        same = all(
            torch.equal(tensor.cpu(), known[name])
            for name, tensor in quantized.state_dict().items()
            if name in known
        )
        yield "loaded on a CPU, the same tensors", str(same), "", same
        ours, theirs = (_logits(model) for model in (quantized, loaded))
        difference = int((ours != theirs).sum())
        yield (
            "mask logits that differ from a CPU's",
            difference,
            f"of {ours.numel()}",
            difference == 0,
        )


def same_again(device: str, small: bool) -> Found:
    """What must give the same bits twice."""
    layer = nn.ConvTranspose2d(64, 32, 2, 2).to(device)
    neck = nn.Conv2d(64, 64, 3, padding=1).to(device)
    x = torch.randn(1, 64, 64, 64, device=device)
    found = set()
    for _ in range(3 if small else 10):
        neck.zero_grad()
        torch.autograd.backward(layer(neck(x)).square().mean())
        found.add(_digest([neck.weight.grad]))
    yield "gradients of the neck and the upscaling", len(found), "different", len(found) == 1
    last = 12 if small else 24
    digests = {_scale_gradient_apart(device, powers) for powers in ((last - 4, last), (last,))}
    yield (
        "scale gradients, compiled for another size first",
        len(digests),
        "different",
        len(digests) == 1,
    )
    # The last one of them without, so that these are known to change nothing.
    ways = (True, False) if small else (True, True, False)
    with tempfile.TemporaryDirectory() as folder:
        steps = 3 if small else 50
        models = [_quantized(device, Path(folder), steps, small, graphs=graphs) for graphs in ways]
        states = [_digest(list(model.state_dict().values())) for model in models]
        others = [number for number, state in enumerate(states) if state != states[0]]
        yield "runs with another result (the last without CUDA graphs)", str(others), "", not others
        failed = [n for n in range(1 if small else 20) if not audit_model(models[0]).passed]
        yield "audits that failed", len(failed), "", not failed


def limits(device: str, small: bool) -> Found:
    """Memory that is free again, what is said when it is used up, and starting by torchrun."""
    where = torch.device(device)
    before = free_memory(where)
    block = torch.empty(2**20 if small else 20 * 2**30, dtype=torch.uint8, device=device)
    del block
    lost = before - free_memory(where)
    yield "free memory lost by a freed block", lost / 2**30, "GiB", lost < 2**30
    if where.type == "cuda":
        try:
            torch.empty(2**50, dtype=torch.uint8, device=device)
        except RuntimeError as error:
            yield (
                "used-up memory is known",
                str(is_out_of_memory(error)),
                "",
                is_out_of_memory(error),
            )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1"]
    command += [
        "-m",
        "ptq4sam",
        "cost",
        "--model",
        "vit_nano",
        "--scheme",
        str(_ROOT / "exp/config44.yaml"),
    ]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    yield (
        "torchrun with one process",
        done.stderr[-300:] if done.returncode else "ran",
        "",
        done.returncode == 0,
    )


class _NoWaiting:
    """Progress that lets CUDA refuse what makes the host wait, within all steps but the last.

    Attributes:
        watched: steps that were; one that waits ends the check with CUDA's own error.
    """

    def __init__(self, device: torch.device) -> None:
        self._watching = device.type == "cuda"
        self.watched = 0

    def __call__(self, steps: Sequence[T], description: str) -> Iterable[T]:
        """The steps themselves."""
        for number, step in enumerate(steps):
            inside = description.startswith("reconstructing") and 2 <= number < len(steps) - 1
            if not (self._watching and inside):
                yield step
                continue
            torch.cuda.set_sync_debug_mode("error")
            try:
                yield step
            finally:
                torch.cuda.set_sync_debug_mode("default")
            self.watched += 1


@contextlib.contextmanager
def _slower_ways() -> Iterator[list[str]]:
    """What is said within the `with` block of what a device could not do the fast way."""
    said: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handler = Handler(logging.WARNING)
    loggers = [logging.getLogger(name) for name in _FAST]
    try:
        for logger in loggers:
            logger.addHandler(handler)
        yield said
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def _quantized(
    device: str,
    folder: Path,
    steps: int,
    small: bool,
    progress: Any = ptq4sam.progress.silent,
    graphs: bool = True,
) -> QuantizedSam:
    """vit_nano by PTQ4SAM-L at 4 bits, from two scenes; in small, one with random weights."""
    data = ptq4sam.CocoDataset(*write_scenes(folder, 2, seed=0))
    scheme = Scheme.from_yaml(_ROOT / "exp" / "ptq4sam-l44.yaml")
    # The search for the ranges of weights takes longest, and is timed by another check.
    quick = scheme.with_overrides(
        "calibrate=2", "w_qconfig.observer=MinMaxObserver", f"recon.cuda_graphs={graphs}"
    )
    torch.manual_seed(0)
    sam = build_sam(_SMALL).to(device) if small else ptq4sam.load_sam("vit_nano", device=device)
    return ptq4sam.quantize(sam, data, quick.with_steps(steps), progress=progress)


def _logits(sam: Any) -> torch.Tensor:
    picture = np.random.default_rng(0).integers(0, 256, (192, 256, 3), dtype=np.uint8)
    predictor = Predictor(sam)
    return predictor.predict(boxes=_BOXES, embedding=predictor.embed(picture)).low_res.cpu()


def _digest(tensors: Sequence[torch.Tensor | None]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        if tensor is None:
            raise ValueError("there is no gradient")
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _scale_gradient_apart(device: str, powers: Sequence[int]) -> str:
    command = [sys.executable, str(Path(__file__)), device, *map(str, powers)]
    paths = filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return done.stdout.strip()


def _scale_gradient(device: str, powers: Sequence[int]) -> str:
    """Digest of a scale's gradient over the last of tensors of 2^power elements."""
    digest = ""
    for power in powers:
        generator = torch.Generator("cpu").manual_seed(0)
        x = torch.randn(2**power, generator=generator, device="cpu").to(device)
        scale = torch.tensor(0.1, device=device, requires_grad=True)
        found = fake_quantize(x, scale, torch.tensor(8.0, device=device), Grid(4))
        torch.autograd.backward(found.sum())
        digest = _digest([scale.grad])
    return digest


if __name__ == "__main__":
    sys.stdout.write(_scale_gradient(sys.argv[1], [int(power) for power in sys.argv[2:]]) + "\n")
