"""From the published state dicts to those of inference: batch normalisations are folded."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ptq4sam.families.folding import fold_norms

NORM_EPS = 1e-5
"""Of the batch normalisations."""

_UNUSED = ("image_encoder.norm_head.", "image_encoder.head.")
"""The classifier of ImageNet, which a SAM never calls."""


def fold_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fold batch normalisations (see `fold_norms`), and drop the classifier."""
    kept = {name: value for name, value in state.items() if not name.startswith(_UNUSED)}
    return fold_norms(kept, "c", "bn", NORM_EPS)
