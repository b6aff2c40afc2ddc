"""Seconds of a range search: ours against the naive one, which tries one range after the other.

    python benchmarks/observers.py [--side 768] [--bits 8] [--keys 4096] [--device cpu]

First the MSE observer on a weight: the naive search quantizes it once for each of 100 widths and
2^bits zero points. Then the granularity of a softmax output of SAM-B's size, which the published
search tries on all queries. Both sides get the same tensors, and what they find is compared.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

# Before torch, which then knows how its threads wait.
from ptq4sam.allocator import keep_freed_memory

# isort: split
import torch
from devices import add_device, finish
from torch import Tensor

from ptq4sam.methods.adaptive_granularity import AdaptiveGranularityQuantizer
from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.mse import POWER, WIDTHS, Side, grid_search

_HEADS, _HEAD_DIM = 12, 64


def naive_search(x: Tensor, grid: Grid) -> tuple[float, float]:
    """Every width and zero point, as the published observer goes through them."""
    extent = x.max().clamp(min=0) - x.min().clamp(max=0)
    best = (float("inf"), 0.0, 0.0)
    for step in range(1, WIDTHS + 1):
        width = extent / WIDTHS * step
        for code in range(grid.levels):
            low = -code * (width / grid.qmax)
            scale, zero = grid.affine_parameters(low, width + low)
            codes = (torch.round(x / scale) + zero).clamp(grid.qmin, grid.qmax)
            loss = float((((codes - zero) * scale - x).abs() ** POWER).mean())
            if loss < best[0]:
                best = (loss, float(low), float(width + low))
    return best[1], best[2]


def timed(
    work: Callable[[], tuple[float, float]], device: str
) -> tuple[float, tuple[float, float]]:
    """Seconds, and what was found."""
    finish(device)
    started = time.perf_counter()
    found = work()
    finish(device)
    return time.perf_counter() - started, found


def searched_granularity(attention: Tensor, value: Tensor, exact: bool) -> tuple[float, float]:
    """Tau and scale of one batch."""
    quantizer = AdaptiveGranularityQuantizer(Grid(4), exact).to(attention.device)
    with torch.no_grad():
        quantizer.observe(attention, value)
    return float(quantizer.tau), float(quantizer.scale.detach())


def main(write: Callable[[str], object] = sys.stdout.write) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=768, help="rows and columns of the weight")
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--keys", type=int, default=4096, help="tokens of the attention")
    add_device(parser)
    arguments = parser.parse_args()
    device = arguments.device
    keep_freed_memory()
    torch.manual_seed(0)
    write("| search | other s | ours s | faster | other found | ours found |\n")
    write("|---|---|---|---|---|---|\n")

    def row(
        name: str, other: Callable[[], tuple[float, float]], ours: Callable[[], tuple[float, float]]
    ) -> None:
        ours_seconds, ours_found = timed(ours, device)
        seconds, found = timed(other, device)
        write(
            f"| {name} | {seconds:.3g} | {ours_seconds:.3g} | {seconds / ours_seconds:.1f} "
            f"| {found[0]:.5g}, {found[1]:.5g} | {ours_found[0]:.5g}, {ours_found[1]:.5g} |\n"
        )

    weight, grid = (
        0.02 * torch.randn(arguments.side, arguments.side, device=device),
        Grid(arguments.bits),
    )

    def our_search() -> tuple[float, float]:
        low, high = grid_search(weight.reshape(1, -1), grid, Side.BOTH)
        return float(low), float(high)

    row(
        f"MSE range of {arguments.side}x{arguments.side} at {arguments.bits} bits, against naive",
        lambda: naive_search(weight, grid),
        our_search,
    )
    logits = 3 * torch.randn(_HEADS, arguments.keys, arguments.keys, device=device)
    attention = logits.softmax(-1)
    del logits
    value = torch.randn(_HEADS, arguments.keys, _HEAD_DIM, device=device)
    row(
        f"granularity of {_HEADS}x{arguments.keys}x{arguments.keys} at 4 bits, against exact",
        lambda: searched_granularity(attention, value, exact=True),
        lambda: searched_granularity(attention, value, exact=False),
    )


if __name__ == "__main__":
    main()
