"""Sizes of the channels of layers' inputs, and the strength with which they are made alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ptq4sam.methods.method import Calibration
from ptq4sam.records import Record

_ROWS = 2048
"""Of a layer's inputs that errors are measured on."""


@dataclass(frozen=True)
class Strengths(Record):
    """Settings of methods that make channels alike.

    Attributes:
        strengths: what the power of sizes is chosen from, beside 0.
    """

    strengths: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)

    def _validate(self) -> None:
        good = len(self.strengths) > 0 and all(0 < a <= 1 for a in self.strengths)
        self._require(good, "strengths", "some above 0, up to 1")

    def best(
        self, of: Callable[[float], Tensor], error: Callable[[Tensor], float]
    ) -> Tensor | None:
        """What `of` gives for the strength of least error; None where that is 0."""
        best, least = None, error(of(0.0))
        for strength in self.strengths:
            tried = of(strength)
            found = error(tried)
            if found < least:
                best, least = tried, found
        return best


@dataclass
class Seen:
    """Inputs of a layer.

    Attributes:
        few: rows that are kept of a picture.
        axis: of channels.
        rows: [few, in] of each picture.
        ends: [2, in] smallest and largest number of each channel, of each picture.
    """

    few: int
    axis: int = -1
    rows: list[Tensor] = field(default_factory=list)
    ends: list[Tensor] = field(default_factory=list)

    def add(self, _layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Take the input of a call into account: a hook."""
        x = inputs[0].movedim(self.axis, -1).flatten(0, -2)
        self.rows.append(x[:: -(-len(x) // self.few)].clone())
        self.ends.append(torch.stack(torch.aminmax(x, dim=0)))

    def scales(self, strength: float) -> Tensor:
        """Scales of all channels [in]; channels that are always 0 keep theirs."""
        sizes = torch.stack(self.ends).abs().amax((0, 1)).double()
        used = sizes > 0
        logs = torch.where(used, sizes.clamp(min=1e-30).log(), 0.0)
        middle = logs.sum() / used.sum().clamp(min=1)
        scales = torch.where(used, ((logs - middle) * strength).exp(), 1.0)
        return scales.to(self.rows[0].dtype)


def inputs_seen(
    calibration: Calibration, layers: Mapping[str, nn.Module], axis: int = -1
) -> dict[str, Seen]:
    """Inputs of layers on the calibration pictures, channels lying along an axis."""
    few = -(-_ROWS // len(calibration.items))
    seen = {name: Seen(few, axis) for name in layers}
    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(seen[name].add).remove)
        for item in calibration.items:
            calibration.run(item)
    return seen
