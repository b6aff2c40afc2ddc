"""Where a benchmark computes: the seconds and the peak memory of a CPU or a GPU."""

from __future__ import annotations

import argparse
import resource


def add_device(parser: argparse.ArgumentParser) -> None:
    """The flag of benchmarks that compute on a device; figures of a GPU are its own memory's."""
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")


def finish(device: str) -> None:
    """Wait for a GPU: it computes later than it is told to."""
    if not device.startswith("cpu"):
        import torch

        getattr(torch, device.partition(":")[0]).synchronize()


def peak_mib(device: str) -> float:
    """Peak so far, in MiB: of this process's memory, or of what torch had of a GPU's."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    # Linux gives kilobytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
