"""Random choice of elements that stay float (QDrop, Wei et al. 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

_STEPS = 256


def dropped(
    shape: torch.Size, probability: float, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """Choose elements at random.

    A byte an element decides, so that eight elements share one draw of the generator: drawing a
    float for each took longer on a CPU than quantizing it.

    Args:
        shape: of the result.
        probability: of an element being chosen, to the next 1/256 (the published 1/2 is exact).
        generator: source of the choice; None is torch's own.
        device: of the result.

    Returns:
        Boolean.
    """
    source = device if generator is None else generator.device
    words = torch.empty((shape.numel() + 7) // 8, dtype=torch.int64, device=source)
    words.random_(-(2**63), None, generator=generator)
    limit = min(_STEPS - 1, round(probability * _STEPS))
    chosen = words.view(torch.uint8)[: shape.numel()] < limit
    return chosen.reshape(shape).to(device)
