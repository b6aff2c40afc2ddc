"""Peak memory of a float SAM's image encoder: ours against the segment-anything package.

Each measurement runs in a process of its own, since a peak can never be taken back:

    python benchmarks/sam_memory.py [--name vit_b] [--threads N] [--device cpu]

Both process images and peaks are read from the kernel (resident set, in MB of 2**20 bytes); on a
GPU they are torch's share of its memory.
"Absolute" is the process's peak; "above import" is the peak less what the process held after its
imports, so weights and activations alone. Weights are random: memory does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from devices import add_device, finish, peak_mib

MODELS = ("ptq4sam", "segment-anything")
# glibc's settings under which PyTorch reuses large temporaries instead of unmapping them.
ALLOCATORS = {
    "default": {},
    "tuned": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)},
}


def resident_mib() -> float:
    """Resident memory of this process now, in MiB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def held_mib(device: str) -> float:
    """Memory of the device that this process holds now, in MiB."""
    if not device.startswith("cuda"):
        return resident_mib()
    import torch

    return torch.cuda.memory_allocated(device) / 2**20


def measure(model: str, name: str, threads: int, device: str) -> dict[str, float]:
    """Encode one picture with one of the models in this process; memory in MiB and seconds."""
    import torch

    if model == "ptq4sam":
        from ptq4sam.families import build_sam as build
    else:
        from segment_anything import sam_model_registry

        build = sam_model_registry.__getitem__
    torch.set_num_threads(threads)
    after_import = held_mib(device)
    sam = build(name) if model == "ptq4sam" else build(name)()
    sam.eval().to(device)
    after_building = held_mib(device)
    side = sam.image_encoder.img_size
    start = time.perf_counter()
    with torch.inference_mode():
        sam.image_encoder(torch.randn(1, 3, side, side, device=device))
    finish(device)
    seconds = time.perf_counter() - start
    peak = peak_mib(device)
    return {
        "import": after_import,
        "weights": after_building - after_import,
        "peak": peak,
        "seconds": seconds,
    }


def measure_apart(
    model: str, allocator: str, name: str, threads: int, device: str
) -> dict[str, float]:
    """Run `measure` in a fresh process."""
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | ALLOCATORS[allocator] | {"PYTHONPATH": path}
    command = [sys.executable, __file__, "--model", model, "--name", name]
    command += ["--threads", str(threads), "--device", device]
    result = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(result.stdout))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="vit_b", choices=("vit_b", "vit_l", "vit_h"))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--model", choices=MODELS, help="measure this one alone, as JSON")
    add_device(parser)
    arguments = parser.parse_args()
    given = arguments.name, arguments.threads, arguments.device
    write = sys.stdout.write
    if arguments.model:
        write(json.dumps(measure(arguments.model, *given)))
        return
    write(
        f"{arguments.name}, one picture on {arguments.device}, {arguments.threads} thread(s), MiB\n"
    )
    write("| allocator | model | weights | peak, absolute | peak, above import | seconds |\n")
    write("|---|---|---|---|---|---|\n")
    for allocator in ALLOCATORS:
        peaks = []
        for model in MODELS:
            found = measure_apart(model, allocator, *given)
            peaks.append((found["peak"], found["peak"] - found["import"]))
            row = (found["weights"], *peaks[-1])
            cells = " | ".join(f"{value:.0f}" for value in row)
            write(f"| {allocator} | {model} | {cells} | {found['seconds']:.1f} |\n")
        ours, theirs = peaks
        absolute, above = ours[0] / theirs[0], ours[1] / theirs[1]
        write(f"| {allocator} | ratio | | {absolute:.2f} | {above:.2f} | |\n")


if __name__ == "__main__":
    main()
