"""From the published state dicts to those of inference: batch normalisations are folded."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ptq4sam.families.efficientvit.layers import NORM_EPS
from ptq4sam.families.folding import fold_norms


def fold_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fold batch normalisations; see `fold_norms`."""
    return fold_norms(state, "conv", "norm", NORM_EPS)
