"""Weights by the rule that golden vectors of published SAMs were recorded with."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def official_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Each tensor depends on its name and shape alone."""
    return {name: _by_rule(name, shape) for name, shape in shapes.items()}


def _by_rule(name: str, shape: tuple[int, ...]) -> Tensor:
    if name.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.int64)
    random = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("running_var"):
        random = 1 + 0.1 * np.abs(random)
    elif name.endswith(("running_mean", "bias")):
        random = 0.1 * random
    elif name.endswith("weight"):
        many = len(shape) > 1
        random = random / np.sqrt(np.prod(shape[1:])) if many else 1 + 0.1 * random
    return torch.from_numpy(np.asarray(random, np.float32))
