"""What makes the numbers of a run come out again, or tells why they did not."""

from __future__ import annotations

import contextlib
import platform
import random
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch

from ptq4sam.evaluation.evaluators import EVALUATORS
from ptq4sam.numerics import description
from ptq4sam.quantization.fused import compiles
from ptq4sam.version import __version__


def fix_seeds(seed: int) -> None:
    """Fix the global generators, for whatever draws from them."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def arithmetic(device: torch.device) -> dict[str, str]:
    """What the last bits of numbers computed on a device depend on."""
    return {**description(device), "kernels": "compiled" if compiles(device) else "one by one"}


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {
        "ptq4sam": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    for evaluator in EVALUATORS:
        with contextlib.suppress(PackageNotFoundError):
            found[evaluator] = version(evaluator)
    return found
