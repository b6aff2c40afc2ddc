"""Keys around zero: the mean of each key channel is folded out of the bias that gives it.

A softmax does not see what all logits of a query have in common. With m the same for all keys,

    q (k_j - m) = q k_j - q m,

so that subtracting the channels' means leaves the attention as it is, to the rounding of floats,
and leaves the key's grid the spread alone. Relative positions that depend on the query change
nothing of that; keys of padded places come from the same bias. Where bimodal integration brings two
peaks together by signs, this brings all channels together, whatever they look like.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from ptq4sam.methods.method import METHODS, Calibration, Method
from ptq4sam.operators.base import QuantizedLayer
from ptq4sam.records import NoSettings


@METHODS.register("key-centring")
class KeyCentring(Method[NoSettings]):
    """Of all attentions whose keys come from a linear layer with a bias."""

    def before_ranges(self, calibration: Calibration) -> Sequence[str]:
        """Move biases by the means over all pictures; the float output stays as it is."""
        keys: dict[str, tuple[QuantizedLayer, slice]] = calibration.sam.key_outputs()
        keys = {name: found for name, found in keys.items() if found[0].bias is not None}
        sums: dict[str, Tensor] = {}
        counts = dict.fromkeys(keys, 0)

        def see(
            name: str, place: slice, _layer: nn.Module, _inputs: object, output: Tensor
        ) -> None:
            rows = output[..., place].flatten(0, -2)
            total = rows.sum(0, dtype=torch.float64)
            sums[name] = sums[name] + total if name in sums else total
            counts[name] += len(rows)

        with ExitStack() as hooks:
            for name, (layer, place) in keys.items():
                hooks.callback(layer.register_forward_hook(partial(see, name, place)).remove)
            for item in calibration.items:
                calibration.run(item)
        for name, total in sums.items():
            layer, place = keys[name]
            bias = cast(Tensor, layer.bias)
            bias[place] -= (total / counts[name]).to(bias.dtype)
        return sorted(sums)
