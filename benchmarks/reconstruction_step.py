"""Seconds a reconstruction step and peak memory: ours against a plain eager loop.

    python benchmarks/reconstruction_step.py [--steps 5] [--units attention mlp decoder]
                                             [--device cpu] [--precision float32]

Units of a SAM-B at 1024 px with random weights, W4A4 with adaptive granularity, on random
activations of the real shapes; the same calibrated unit and the same activations for both. The
plain loop (benchmarks/plain.py) runs with the C library's default allocator, ours with what the
commands set. Each side runs in a process of its own, since a peak can never be taken back. On a GPU
peaks are those of its memory.

"Float" is the float unit forward and backward, to its inputs and weights, without a quantizer or an
optimizer: what both sides have to compute in any case. A step that only did this would be so many
times faster than the plain one as "at most" says.

A unit's inputs and targets have to be captured before its steps: by the plain loop from the image
each time, through the float and the quantized model up to the unit; by ours from the cached output
of the unit before, which takes one float and three quantized passes of the unit. And the ranges of
its weights have to be searched: plainly by quantizing once for each of 100 widths and 16 zero
points (timed at one zero point of the 16, for each takes the same), by ours to the same result.
The second table adds each step's share of the captures of 32 pictures and of the search, for as
many steps as the presets make.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from devices import add_device, finish, peak_mib

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ptq4sam.model.insertion import QuantizedSam

SIDES = ("plain", "ours", "float")
SHAPES: dict[str, tuple[str, list[tuple[int, ...]]]] = {
    "attention": ("image_encoder.blocks.6.attn", [(25, 14, 14, 768)]),
    "global attention": ("image_encoder.blocks.5.attn", [(1, 64, 64, 768)]),
    "mlp": ("image_encoder.blocks.6.mlp", [(1, 64, 64, 768)]),
    "decoder": (
        "mask_decoder.transformer.layers.0.cross_attn_image_to_token",
        [(100, 4096, 256), (100, 7, 256), (100, 7, 256)],
    ),
}
"""Units by name: path, and shapes of the arguments (the decoder's with 100 boxes).

Those of the encoder are in its middle, where a capture from the image takes what it takes on
average.
"""
PRESETS = (500, 5_000, 20_000)
"""Steps a unit of the presets quick, standard and paper."""
PICTURES = 32


class Clock:
    """Wraps the steps of a loop and keeps the seconds of each."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.seconds: list[float] = []

    def __call__(self, steps: Iterable[int]) -> Iterator[int]:
        """The steps themselves."""
        for step in steps:
            started = time.perf_counter()
            yield step
            finish(self._device)
            self.seconds.append(time.perf_counter() - started)


def four_bits(steps: int, precision: str) -> dict[str, object]:
    """A scheme with everything learned that can be."""
    return {
        "a_qconfig": {"quantizer": "LSQFakeQuantize", "observer": "MinMaxObserver", "bit": 4},
        "w_qconfig": {
            "quantizer": "AdaRoundFakeQuantize",
            "observer": "MinMaxObserver",
            "bit": 4,
            "ch_axis": 0,
        },
        "ptq4sam": {"AGQ": True},
        "recon": {"iters": steps, "precision": precision},
    }


def measure(
    side: str, name: str, steps: int, threads: int, precision: str, device: str
) -> dict[str, float]:
    """Reconstruct one unit in this process."""
    import torch

    from ptq4sam.allocator import keep_freed_memory
    from ptq4sam.families import build_sam
    from ptq4sam.methods.reconstruction import UnitData, reconstruct_unit
    from ptq4sam.model.calibration import observing_activations
    from ptq4sam.model.insertion import insert_quantizers
    from ptq4sam.operators.base import observe_weights, quantized_layers
    from ptq4sam.quantization.modes import quantizer_mode
    from ptq4sam.quantization.quantizers import Mode
    from ptq4sam.quantization.scheme import Scheme

    if side != "plain":
        keep_freed_memory()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    path, shapes = SHAPES[name]
    scheme = Scheme.from_dict(four_bits(steps, precision))
    settings = scheme.recon
    sam = insert_quantizers(build_sam("vit_b").to(device), scheme)
    unit = sam.get_submodule(path)
    exact = [tuple(torch.randn(shape, device=device) for shape in shapes)]
    inputs = [tuple(x + 0.05 * torch.randn_like(x) for x in exact[0])]
    with torch.no_grad():
        with observing_activations(unit):
            unit(*inputs[0])
        observe_weights(unit)
        with quantizer_mode(unit, Mode.FLOAT):
            targets = [unit(*exact[0])]
    clock = Clock(device)
    if side == "float":
        alone = build_sam("vit_b").to(device).get_submodule(path)
        # In our precision, since it is the least that our step can take.
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            step_in_float(alone, exact[0], clock(range(steps)))
        return {"seconds": statistics.median(clock.seconds[1:])}
    if side == "ours":
        losses = reconstruct_unit(
            name,
            unit,
            [(layer.weight, layer.weight_quantizer) for _, layer in quantized_layers(unit)],
            UnitData(inputs, exact, [(targets[0],)]),
            settings,
            torch.Generator(device).manual_seed(0),
            clock,
        )
        after = losses.after
        search = seconds_of_search(unit, device)
        peak = peak_mib(device)
        capture = seconds_of_passes(unit, inputs[0], device)
    else:
        from plain import make_plain, reconstruct_plainly

        search = seconds_of_plain_search(unit, device)
        make_plain(unit)
        after = reconstruct_plainly(unit, inputs, exact, targets, settings, clock(range(steps)))
        peak = peak_mib(device)
        capture = seconds_from_image(sam, unit, device)
    return {
        "seconds": statistics.median(clock.seconds[1:]),
        "peak": peak / 2**10,
        "loss": after,
        "capture": capture,
        "search": search,
    }


def step_in_float(unit: nn.Module, arguments: tuple[Tensor, ...], steps: Iterable[int]) -> None:
    """Forward and backward of a unit without quantizers, to its arguments and its weights."""
    inputs = [argument.clone().requires_grad_() for argument in arguments]
    for _ in steps:
        outputs = unit(*inputs)
        outputs.pow(2).sum(1).mean().backward()


def seconds_of_search(unit: nn.Module, device: str) -> float:
    """Our search of the ranges of the unit's weights."""
    from ptq4sam.operators.base import quantized_layers
    from ptq4sam.quantization.observers import OBSERVERS

    started = time.perf_counter()
    for _, layer in quantized_layers(unit):
        OBSERVERS["MSEObserver"](layer.weight_quantizer.grid, 0).range_of(layer.weight.detach())
    finish(device)
    return time.perf_counter() - started


def seconds_of_plain_search(unit: nn.Module, device: str) -> float:
    """The plain search of the ranges of the unit's weights, channel by channel of each at once."""
    import torch

    from ptq4sam.operators.base import quantized_layers
    from ptq4sam.quantization.mse import POWER, WIDTHS

    seconds = 0.0
    for _, layer in quantized_layers(unit):
        grid = layer.weight_quantizer.grid
        rows = layer.weight.detach().flatten(1)
        low, high = rows.min(1).values.clamp(max=0), rows.max(1).values.clamp(min=0)
        best = torch.full_like(low, float("inf"))
        started = time.perf_counter()
        for step in range(1, WIDTHS + 1):
            scale = ((high - low) / WIDTHS * step / grid.qmax)[:, None]
            zero = grid.levels // 2
            codes = (torch.round(rows / scale) + zero).clamp(grid.qmin, grid.qmax)
            loss = (((codes - zero) * scale - rows).abs() ** POWER).mean(1)
            best = torch.minimum(best, loss)
        finish(device)
        seconds += (time.perf_counter() - started) * grid.levels
    return seconds


def seconds_of_passes(unit: nn.Module, arguments: tuple[Tensor, ...], device: str) -> float:
    """Our capture of a picture: one float pass of the unit, three quantized ones."""
    import torch

    from ptq4sam.quantization.modes import quantizer_mode
    from ptq4sam.quantization.quantizers import Mode

    started = time.perf_counter()
    with torch.no_grad():
        with quantizer_mode(unit, Mode.FLOAT):
            unit(*arguments)
        for _ in range(3):
            unit(*arguments)
    finish(device)
    return time.perf_counter() - started


def seconds_from_image(sam: QuantizedSam, unit: nn.Module, device: str) -> float:
    """The plain capture of a picture: float and quantized model, from the image to the unit."""
    import torch
    from plain import calibrate_blindly, make_plain

    from ptq4sam.families import build_sam
    from ptq4sam.model.calibration import CalibrationItem, run_item
    from ptq4sam.model.capture import capture_call

    calibrate_blindly(sam)
    make_plain(sam)
    float_sam = build_sam("vit_b").to(device).eval()
    boxes = torch.tensor([[100.0, 100, 400, 500]], device=device)
    if unit in set(sam.mask_decoder.modules()):
        boxes = boxes.expand(100, 4)
    item = CalibrationItem(torch.randn(1, 3, 1024, 1024, device=device), boxes)
    path = next(name for name, module in sam.named_modules() if module is unit)
    started = time.perf_counter()
    for model in (float_sam, sam):
        capture_call(model.get_submodule(path), functools.partial(run_item, model, item))
    finish(device)
    return time.perf_counter() - started


def measure_apart(
    side: str, name: str, steps: int, threads: int, precision: str, device: str
) -> dict[str, float]:
    """Run `measure` in a fresh process."""
    root = str(Path(__file__).resolve().parents[1])
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    environment["PYTHONPATH"] = root
    # Few steps are timed: without this kernels would not be made before the last of them.
    environment.setdefault("PTQ4SAM_COMPILE", "1")
    command = [sys.executable, __file__, "--side", side, "--units", name, "--steps", str(steps)]
    command += ["--threads", str(threads), "--precision", precision]
    command += ["--device", device]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout))


def main(write: Callable[[str], object] = sys.stdout.write) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--units", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16", "tf32"])
    add_device(parser)
    parser.add_argument("--side", choices=SIDES, help="measure this one alone, as JSON")
    arguments = parser.parse_args()
    steps, threads, precision = arguments.steps, arguments.threads, arguments.precision
    given = steps, threads, precision, arguments.device
    if arguments.side:
        figures = measure(arguments.side, arguments.units[0], *given)
        write(json.dumps(figures))
        return
    write(
        f"SAM-B at 1024 px on {arguments.device}, {steps} steps, {threads} thread(s), ours in "
        f"{precision}; "
        "seconds are medians\n"
    )
    write("| unit | plain s | ours s | faster | float s | at most | plain GiB | ours GiB ")
    write("| loss ours / plain |\n|---|---|---|---|---|---|---|---|---|\n")
    measured = {}
    for name in arguments.units:
        plain, ours, alone = (measure_apart(side, name, *given) for side in SIDES)
        measured[name] = plain, ours
        write(
            f"| {name} | {plain['seconds']:.2f} | {ours['seconds']:.2f} "
            f"| {plain['seconds'] / ours['seconds']:.1f} | {alone['seconds']:.2f} "
            f"| {plain['seconds'] / alone['seconds']:.1f} | {plain['peak']:.1f} "
            f"| {ours['peak']:.1f} | {ours['loss'] / plain['loss']:.3f} |\n"
        )
    write(f"\nWith captures of {PICTURES} pictures and the weights' search, for so many steps\n")
    write("| unit | plain capture, search s | ours | " + " | ".join(map(str, PRESETS)) + " |\n")
    write("|---|---|---|---|---|---|\n")
    for name, (plain, ours) in measured.items():
        ratios = (with_start(plain, count) / with_start(ours, count) for count in PRESETS)
        both = (f"{side['capture']:.2f}, {side['search']:.2f}" for side in (plain, ours))
        write(
            f"| {name} | {' | '.join(both)} | "
            + " | ".join(f"{ratio:.1f} times faster" for ratio in ratios)
            + " |\n"
        )


def with_start(figures: dict[str, float], steps: int) -> float:
    """Seconds a step, with its share of the captures and the search before it."""
    return figures["seconds"] + (PICTURES * figures["capture"] + figures["search"]) / steps


if __name__ == "__main__":
    main()
