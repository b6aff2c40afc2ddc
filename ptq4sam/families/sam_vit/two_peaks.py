"""A SAM with bimodal keys, made of one without: a test bed for what is done about them.

A softmax does not see what all logits of a query have in common. With c the same for all keys,
q (k_j + c) = q k_j + q c, and so a constant may be added to the bias of a key projection: float
outputs stay as they are, but for rounding. Constants of one size and of either sign put each
channel of the keys into one of two peaks, as the keys of the published SAMs are (PTQ4SAM, Lv et al.
2024, figure 1).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ptq4sam.sam.description import Description

DISTANCE = 4.0
"""Of a peak from zero, in lengths of a weight's row: keys spread by about one of them."""


def with_two_peaks(state: Mapping[str, Tensor], description: Description) -> dict[str, Tensor]:
    """Tensors of a SAM whose foldable keys have two peaks; others stay the same objects.

    Args:
        state: under our names.
        description: says which keys may be folded.
    """
    changed = dict(state)
    for name, bias in state.items():
        owner, _, projection = name.removesuffix(".bias").rpartition(".")
        foldable = description.foldable_at(owner)
        if foldable is None or name != f"{owner}.{foldable.key}.bias":
            continue
        length = state[f"{owner}.{projection}.weight"].float().norm(dim=1).mean()
        # Neighbours differ, so that each head has channels of both signs.
        signs = 1.0 - 2.0 * (torch.arange(len(bias), device=bias.device) % 2)
        # Wider than the halves that weights ship as, which would round every channel otherwise.
        changed[name] = bias.float() + DISTANCE * length * signs
    return changed
