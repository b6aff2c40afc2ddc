"""Checks of `gpu_check.py`: seconds and memory of steps, calibration and evaluation."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ptq4sam.families import build_sam
from ptq4sam.methods.granularity_search import ScaleSearch
from ptq4sam.methods.reconstruction import UnitData, reconstruct_unit
from ptq4sam.model.cache import ActivationCache, KeptSequence
from ptq4sam.model.calibration import observing_activations
from ptq4sam.model.insertion import QuantizedSam, insert_quantizers
from ptq4sam.operators.base import observe_weights, put_weights_on_grid, quantized_layers
from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.modes import quantizer_mode
from ptq4sam.quantization.observers import OBSERVERS
from ptq4sam.quantization.quantizers import Mode
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.quantization.whole import WholeLinear
from ptq4sam.sam.predictor import Predictor

Found = Iterator[tuple[Any, ...]]
_SCHEME = Path(__file__).resolve().parents[1] / "exp" / "ptq4sam-l44.yaml"
_BLOCKS = "image_encoder.blocks"
_CROSS = "mask_decoder.transformer.layers.0.cross_attn_image_to_token"
_UNITS: dict[str, tuple[str, list[tuple[int, ...]]]] = {
    "windowed attention": (f"{_BLOCKS}.6.attn", [(25, 14, 14, 768)]),
    "global attention": (f"{_BLOCKS}.5.attn", [(1, 64, 64, 768)]),
    "MLP": (f"{_BLOCKS}.6.mlp", [(1, 64, 64, 768)]),
    "image to token, 100 boxes": (_CROSS, [(100, 4096, 256), (100, 7, 256), (100, 7, 256)]),
}
_SMALL_UNITS: dict[str, tuple[str, list[tuple[int, ...]]]] = {
    "windowed attention": (f"{_BLOCKS}.2.attn", [(4, 8, 8, 160)]),
    "MLP": (f"{_BLOCKS}.2.mlp", [(1, 16, 16, 160)]),
    "image to token, 2 boxes": (_CROSS, [(2, 64, 128), (2, 7, 128), (2, 7, 128)]),
}


_WAYS = {
    "float32": (),
    "float32 without graphs": ("recon.cuda_graphs=false",),
    "bfloat16": ("recon.precision=bfloat16",),
}


def steps(device: str, small: bool) -> Found:
    """Milliseconds of a step and peak memory of each kind of unit, W4A4, all that is learned."""
    for way, more in _WAYS.items():
        sam = _four_bits("vit_nano" if small else "vit_b", device, 5 if small else 50, *more)
        for name, (path, shapes) in (_SMALL_UNITS if small else _UNITS).items():
            yield from _step(f"{name}, {way}", sam, path, shapes, None)
    if not small:
        name, (path, shapes) = next(reversed(_UNITS.items()))
        yield from _step(f"{name}, out of host memory", sam, path, shapes, 0)


def _step(
    name: str, sam: QuantizedSam, path: str, shapes: list[tuple[int, ...]], budget: int | None
) -> Found:
    unit, device = sam.get_submodule(path), sam.device
    exact = [tuple(torch.randn(shape, device=device) for shape in shapes)]
    inputs = [tuple(x + 0.05 * torch.randn_like(x) for x in exact[0])]
    with torch.no_grad():
        with observing_activations(unit):
            unit(*inputs[0])
        observe_weights(unit)
        with quantizer_mode(unit, Mode.FLOAT):
            targets = [(unit(*exact[0]),)]
    cache = ActivationCache(device, budget)
    data = UnitData(
        *(KeptSequence([cache.keep(b) for b in kind]) for kind in (inputs, exact, targets))
    )
    del inputs, exact, targets
    clock = _Clock(device)
    settings = sam.scheme.recon
    if settings is None:
        raise ValueError("the scheme reconstructs")
    layers = [(layer.weight, layer.weight_quantizer) for _, layer in quantized_layers(unit)]
    generator = torch.Generator(device).manual_seed(0)
    reconstruct_unit(name, unit, layers, data, settings, generator, clock)
    yield (
        f"step of {name}",
        1000 * statistics.median(clock.seconds[len(clock.seconds) // 4 :]),
        "ms",
    )
    if device.type == "cuda":
        yield f"peak of {name}", torch.cuda.max_memory_allocated() / 2**30, "GiB"


class _Clock:
    """Wraps the steps of a loop and keeps the seconds of each."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: list[float] = []
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def __call__(self, steps: Iterable[int]) -> Iterator[int]:
        """The steps themselves."""
        for step in steps:
            started = time.perf_counter()
            yield step
            _wait(self._device)
            self.seconds.append(time.perf_counter() - started)


def calibration(device: str, small: bool) -> Found:
    """Seconds of the searches for ranges and granularities."""
    rows, columns = (64, 96) if small else (3072, 768)
    weight = torch.randn(rows, columns, device=device)
    search = OBSERVERS["MSEObserver"](Grid(4), 0).to(device)
    yield "MSE ranges of a weight", _seconds(lambda: search.range_of(weight), device, 1), "s"
    x = torch.randn(4096 * 8 if small else 4096 * 3072, device=device)
    for name in ("AvgMSEObserver", "AvgMSEFastObserver"):
        observer = OBSERVERS[name](Grid(4)).to(device)
        seconds = _seconds(functools.partial(observer.range_of, x), device, 1)
        yield f"{name} of {x.numel()} values", seconds, "s"
    heads, tokens = (2, 64) if small else (12, 4096)
    attention = torch.randn(heads, tokens, tokens, device=device).softmax(-1)
    value = torch.randn(heads, tokens, 64, device=device)
    granularity = ScaleSearch(attention, value, 16, 1e-3)
    seconds = _seconds(lambda: granularity.error(4, 0.5), device, 2)
    yield "an evaluation of a global attention's granularity", 1000 * seconds, "ms"


@torch.no_grad()
def evaluation(device: str, small: bool) -> Found:
    """Seconds of encoder and decoder, float and quantized; equal masks in pieces; int8 products."""
    name, boxes = ("vit_nano", 4) if small else ("vit_b", 100)
    torch.manual_seed(0)
    sam = build_sam(name).to(device).requires_grad_(False)
    quantized = _four_bits(name, device, 0)
    picture = np.random.default_rng(0).integers(0, 256, (768, 1024, 3), dtype=np.uint8)
    asked = _boxes(boxes)
    for kind, model in (("float", sam), ("quantized", quantized)):
        predictor = Predictor(model)
        if isinstance(model, QuantizedSam):
            _calibrated(model, predictor, picture)
        repeat = 1 if small else 5
        seconds = _seconds(functools.partial(predictor.embed, picture), device, repeat)
        yield f"{kind} encoder of {name}", 1000 * seconds, "ms"
        ask = functools.partial(predictor.predict, boxes=asked, embedding=predictor.embed(picture))
        yield f"{kind} decoder, {boxes} boxes", 1000 * _seconds(ask, device, repeat), "ms"
    few = Predictor(quantized, memory_budget=1)
    one_by_one = few.predict(boxes=asked, embedding=few.embed(picture)).low_res
    # Behind the transformer, whose numbers are whole, the upscaling is float.
    other = ((one_by_one > 0) != (ask().low_res > 0)).float().mean()
    yield (
        "share of mask pixels that prompts one by one change",
        float(other),
        "",
        bool(other < 1e-4),
    )
    rows, inner, columns = (32, 64, 32) if small else (4096, 768, 3072)
    x = torch.randint(-128, 128, (rows, inner), device=device)
    weight = torch.randint(-128, 128, (columns, inner), device=device)
    linear = WholeLinear(weight.float(), -128, 127)
    product = lambda: linear(x.float())  # noqa: E731
    yield "an exact product of the MLP's size", 1000 * _seconds(product, device, 3), "ms"
    if torch.device(device).type == "cuda":
        whole = functools.partial(_int8_product, x, weight)
        yield "the same as int8", 1000 * _seconds(whole, device, 3), "ms"
        same = torch.equal(whole().float(), product())
        yield "int8 and exact products are equal", str(same), "", same


def _int8_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch._int_mm(x.to(torch.int8), weight.to(torch.int8).t())


def _four_bits(name: str, device: str, iterations: int, *more: str) -> QuantizedSam:
    scheme = Scheme.from_yaml(_SCHEME).with_overrides(
        "w_qconfig.observer=MinMaxObserver",
        f"recon.iters={max(1, iterations)}",
        *more,
    )
    torch.manual_seed(0)
    return insert_quantizers(build_sam(name).to(device), scheme)


def _calibrated(sam: QuantizedSam, predictor: Predictor, picture: np.ndarray) -> None:
    with observing_activations(sam):
        predictor.predict(boxes=_boxes(2), embedding=predictor.embed(picture))
    observe_weights(sam)
    put_weights_on_grid(sam)


def _boxes(count: int) -> np.ndarray:
    corners = np.random.default_rng(1).uniform(0, 500, (count, 2))
    return np.concatenate([corners, corners + 200], axis=1)


def _seconds(run: Callable[[], object], device: str, repeat: int) -> float:
    """Median seconds, after one run that does not count where there are several."""
    found = []
    for _ in range(repeat + (repeat > 1)):
        _wait(torch.device(device))
        started = time.perf_counter()
        run()
        _wait(torch.device(device))
        found.append(time.perf_counter() - started)
    return statistics.median(found[-repeat:])


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
