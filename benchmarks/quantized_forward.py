"""Seconds of a simulated quantized forward of an image encoder against the float one.

    python benchmarks/quantized_forward.py [--model vit_b] [--bits 6] [--rounds 3] [--flat]

Random weights, with queries and keys four times as long as drawn, so that the largest attentions
are near 1, as those of trained models are (see the scales that are printed). With --flat they stay
as drawn: attentions are then near 1/4096, and sums of adaptive granularity's points need float64.
Both run in this process, in turns, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import cast

# Before torch, which then knows how its threads wait.
from ptq4sam.allocator import keep_freed_memory

# isort: split
import torch

from ptq4sam.families import build_sam
from ptq4sam.families.sam_vit.image_encoder import Block, ImageEncoderViT
from ptq4sam.methods.adaptive_granularity import AdaptiveGranularityQuantizer
from ptq4sam.model.calibration import observing_activations
from ptq4sam.model.insertion import insert_quantizers
from ptq4sam.operators.base import observe_weights, put_weights_on_grid
from ptq4sam.quantization.scheme import Scheme


def scheme(bits: int) -> Scheme:
    """Adaptive granularity with ranges that are found at once: they do not change the time."""
    return Scheme.from_dict(
        {
            "a_qconfig": {
                "quantizer": "FixedFakeQuantize",
                "observer": "AvgMinMaxObserver",
                "bit": bits,
            },
            "w_qconfig": {
                "quantizer": "FixedFakeQuantize",
                "observer": "MinMaxObserver",
                "bit": bits,
                "ch_axis": 0,
            },
            "ptq4sam": {"AGQ": True},
        }
    )


def sharpen(encoder: ImageEncoderViT, factor: float = 4.0) -> None:
    """Make attentions peaked: queries and keys longer."""
    for block in encoder.blocks:
        qkv = cast(Block, block).attn.qkv
        with torch.no_grad():
            qkv.weight[: 2 * qkv.in_features] *= factor


def softmax_scales(encoder: ImageEncoderViT) -> list[float]:
    """Largest points of adaptive granularity, ascending."""
    return sorted(
        float(module.scale)
        for module in encoder.modules()
        if isinstance(module, AdaptiveGranularityQuantizer)
    )


def main(write: Callable[[str], object] = sys.stdout.write) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_b")
    parser.add_argument("--bits", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--flat", action="store_true", help="attentions as drawn")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    keep_freed_memory()
    # Few forwards are timed: without this kernels would not be made before the last of them.
    os.environ.setdefault("PTQ4SAM_COMPILE", "1")
    torch.manual_seed(0)
    float_sam = build_sam(arguments.model).to(arguments.device).eval()
    if not arguments.flat:
        sharpen(float_sam.image_encoder)
    quantized = insert_quantizers(float_sam, scheme(arguments.bits))
    pixels = torch.randn(1, 3, float_sam.image_size, float_sam.image_size, device=arguments.device)
    encoders = {"float": float_sam.image_encoder, "quantized": quantized.image_encoder}
    seconds: dict[str, list[float]] = {name: [] for name in encoders}
    with torch.no_grad():
        with observing_activations(quantized.image_encoder):
            quantized.image_encoder(pixels)
        observe_weights(quantized.image_encoder)
    put_weights_on_grid(quantized.image_encoder)
    with torch.no_grad():
        for turn in range(arguments.rounds + 1):
            for name, encoder in encoders.items():
                started = time.perf_counter()
                encoder(pixels).sum().item()
                # The first one compiles and fills caches.
                if turn:
                    seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    bits = arguments.bits
    write(f"{arguments.model} image encoder on {arguments.device}, medians of {arguments.rounds}\n")
    scales = softmax_scales(quantized.image_encoder)
    write(f"largest points of softmax quantizers: {scales[0]:.2g} to {scales[-1]:.2g}\n")
    write(f"| float s | W{bits}A{bits} s | ratio |\n|---|---|---|\n")
    ratio = medians["quantized"] / medians["float"]
    write(f"| {medians['float']:.2f} | {medians['quantized']:.2f} | {ratio:.2f} |\n")


if __name__ == "__main__":
    main()
