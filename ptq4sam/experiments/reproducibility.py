"""What makes the numbers of a run come out again, or tells why they did not."""

from __future__ import annotations

import platform
import random

import numpy as np
import torch

import ptq4sam


def fix_seeds(seed: int) -> None:
    """Fix the global generators, for whatever draws from them."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {
        "ptq4sam": ptq4sam.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
