"""Does a quantizer cover what comes to it?"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ptq4sam.quantization.quantizers import Quantizer

_LEAST_SHARE = 1 / 150
"""What a grid and the values must have in common, of the wider of both.

Of vit_nano, calibrated on photographs or scenes, it was 1/19 at least, of a softmax output, on a
picture of noise as on a scene. A scale that is 1000 times too small leaves 1/1000; one that is too
large as much, or a few times that where calibration had clipped the values (1/260 at most).
"""


class Reach:
    """Ends of the values that came to an activation quantizer, and of those that it covers."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer
        self.calls = 0
        self._low = self._high = quantizer.scale.new_zeros(())

    def saw(self, x: Tensor) -> None:
        """Take what came into account; 0 is on every grid."""
        self.calls += 1
        if x.numel():
            low, high = torch.aminmax(x.detach().float())
            self._low = torch.minimum(low, self._low.to(low))
            self._high = torch.maximum(high, self._high.to(high))

    def problems(self, in_reach: bool = True) -> Iterator[str]:
        """No values at all, or values that lie elsewhere than the grid.

        Args:
            in_reach: whether they should lie where the grid is.
        """
        if self.calls == 0:
            yield "no activation passed it"
        if self.calls == 0 or not in_reach:
            return
        low, high = float(self._low), float(self._high)
        first, last = self.quantizer.grid_in_use().ends()
        common = min(high, last) - max(low, first)
        if high > low and common < _LEAST_SHARE * max(high - low, last - first):
            values = f"values from {low:.4g} to {high:.4g}"
            yield f"covers {first:.4g} to {last:.4g}, expected the range of its {values}"
